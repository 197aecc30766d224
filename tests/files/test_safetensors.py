"""safetensors headers: real ones are read, broken and hostile ones refused with a reason."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.errors import FileError
from herdbook.files.safetensors import read_header


def raw(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> Any:
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def test_a_real_file(tmp_path: Path) -> None:
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.float16)}
    safetensors.numpy.save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "np"})
    found = read_header(tmp_path / "m.safetensors").tensors
    assert {n: (e.dtype, e.shape, e.nbytes) for n, e in found.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("F16", (5,), 10),
    }
    whole = (tmp_path / "m.safetensors").read_bytes()
    at = found["a"].start
    assert whole[at : at + 24] == arrays["a"].tobytes()


BROKEN = {
    "empty": (b"", "0 bytes without a header"),
    "short": (b"\x02\0\0", "3 bytes without a header"),
    "oversized header": ((2**60).to_bytes(8, "little") + b"{}", "should have 1,152,921,504,606"),
    "truncated header": ((500).to_bytes(8, "little") + b'{"a":', "the header should have 500"),
    "no JSON": ((4).to_bytes(8, "little") + b"abcd", "the header is no JSON"),
    "deep JSON": (len(b"[" * 9**5).to_bytes(8, "little") + b"[" * 9**5, "the header is no JSON"),
    "a list": (raw([], b""), "the header is no JSON object"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "'a' is described by"),
    "odd type": (raw({"a": entry(0, 4, [1], "Q9")}, b"1234"), "unknown type 'Q9'"),
    "negative": (raw({"a": entry(0, 4, [-1])}, b"1234"), r"the shape \[-1\]"),
    "wrong size": (raw({"a": entry(0, 8, [3])}, b"12345678"), "takes 12 bytes, not 8"),
    "past the end": (raw({"a": entry(0, 8)}, b"1234"), "tensors end at byte"),
    "left over": (raw({"a": entry(0, 4)}, b"12345678"), "tensors end at byte"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "'b' starts at byte"),
    "gap": (raw({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "'b' starts at byte"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(case: str, tmp_path: Path) -> None:
    data, reason = BROKEN[case]
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(FileError, match=reason) as caught:
        read_header(tmp_path / "m.safetensors")
    assert caught.value.next


@given(data=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_entries_or_a_file_error(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("s") / "m.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    with contextlib.suppress(FileError):
        assert read_header(path).tensors == {}
