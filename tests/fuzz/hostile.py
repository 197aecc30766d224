"""What the fuzzers share: how long, in how much memory, and how files are damaged."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from herdbook.errors import HerdbookError

#: of all files here, which share the time
TARGETS = 14
SECONDS = float(os.environ.get("FUZZ_SECONDS", "60")) / TARGETS
#: what a loader may take beyond what the process has, and how long (the machine may be busy)
MEMORY_BYTES, PATIENCE_S = 1_500_000_000, 10.0

common = settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def again_and_again(target: Callable[[], None]) -> None:
    end = time.monotonic() + SECONDS
    rounds = 0
    while time.monotonic() < end:
        target()
        rounds += 1
    print(f"{rounds} rounds of {common.max_examples}")


def holds(use: Callable[[], Any]) -> None:
    start = time.monotonic()
    try:
        use()
    except HerdbookError as error:
        assert str(error) and error.next, "an error says what to do"
    assert time.monotonic() - start < PATIENCE_S


ODD = st.sampled_from(
    [0, 1, -1, 7, 64, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**80]
)
NUMBER = ODD | st.integers(-3, 70) | st.floats() | st.booleans()
JSON = st.recursive(
    st.none() | NUMBER | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def damaged(raw: bytes, data: st.DataObject) -> bytes:
    """Bytes changed, cut out, doubled or put in, also whole numbers of absurd size."""
    out = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, max(len(out) - 1, 0)))
        kind = data.draw(st.sampled_from(["byte", "number", "cut", "insert", "double", "short"]))
        if kind == "byte":
            out[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
        elif kind == "number":
            width = data.draw(st.sampled_from([2, 4, 8]))
            value = data.draw(ODD | st.integers(0, 300)) % 2 ** (8 * width)
            out[at : at + width] = value.to_bytes(width, "little")
        elif kind == "cut":
            del out[at : at + data.draw(st.integers(1, 50))]
        elif kind == "insert":
            out[at:at] = data.draw(st.binary(max_size=12))
        elif kind == "double":
            out[at:at] = out[at : at + data.draw(st.integers(1, 50))]
        else:
            del out[at + len(out) // 2 :]
    return bytes(out)
