"""safetensors headers: real ones are read, broken and hostile ones refused with a reason."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.errors import FileError
from herdbook.files.safetensors import read_header, write
from herdbook.model.checkpoint.weights import NAMES, as_bytes


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


def test_duplicate_names_and_absurd_sizes(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 4))
    for text, data, reason in (
        (f'{{"a":{one},"a":{one}}}', bytes(4), "'a' comes twice"),
        (json.dumps({"a": entry(0, 0, [2**40, 2**40], "F64")}), b"", "takes 9,671,406,556,917"),
        (json.dumps({"a": entry(0, 0, [0, 2**70])}), b"", "has the shape"),
        (json.dumps({"a": entry(4, 0, [1])}), bytes(4), "takes 4 bytes, not -4"),
        (json.dumps({"a": entry(-4, 0, [1])}), bytes(4), "the offsets -4, 0"),
        (json.dumps({"a": entry(0, 4, [1.0])}), bytes(4), r"the shape \[1.0\]"),
        (json.dumps({"a": entry(0, 4, [True])}), bytes(4), r"the shape \[True\]"),
        (json.dumps({"__metadata__": {"a": []}}), b"", "__metadata__ is no mapping of texts"),
        ('{"a":' + "9" * 5000 + "}", b"", "the header is no JSON"),
    ):
        raw = text.encode()
        (tmp_path / "m.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        with pytest.raises(FileError, match=reason):
            read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "nowhere"])
def test_what_is_no_plain_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    """Opening a pipe would wait for ever, reading /dev/zero never end."""
    path = tmp_path / "m.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "nowhere": "/none"}[kind])
    with pytest.raises(FileError, match="is no file"):
        read_header(path)


TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float64)
TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 3), max_size=3)),
    max_size=6,
)


@given(made=TENSORS)
@settings(max_examples=100, deadline=None)
def test_written_files_are_those_of_the_reference(
    made: dict[str, tuple[torch.dtype, list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    held = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in made.items()}
    folder = tmp_path_factory.mktemp("s")
    plan = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in held.items()}
    write(folder / "a", plan, lambda name: as_bytes(held[name]), {"format": "pt"})
    safetensors.torch.save_file(held, folder / "b", metadata={"format": "pt"})
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    assert read_header(folder / "a").metadata == {"format": "pt"}


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def bytes_of(name: str) -> memoryview:
        if name == "b":
            raise KeyboardInterrupt
        return memoryview(bytes(8))

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m", {"a": ("F32", (2,)), "b": ("F32", (2,))}, bytes_of, {})
    assert list(tmp_path.iterdir()) == []
