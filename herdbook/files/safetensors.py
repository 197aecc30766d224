"""safetensors: weight files whose header is checked before anything in them is used.

    length:u64 little-endian, JSON {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    …, "__metadata__": {"format": "pt"}}, then the tensors' bytes

The offsets count from the end of the header and must tile the rest of the file exactly: no gap, no
overlap, nothing past the end. Written files are those of the reference implementation, byte for byte,
but one tensor is in memory at a time.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herdbook.errors import FileError
from herdbook.files.atomic import replacing
from herdbook.files.foreign import MEGABYTE, parse_json

#: the largest published headers (models of tens of thousands of tensors) have about 10 MB
HEADER_LIMIT_BYTES = 32 * MEGABYTE
#: bytes of one value, in the order in which the reference implementation lays the types out
WIDTHS = (
    dict.fromkeys(("U64", "I64", "F64"), 8)
    | dict.fromkeys(("F32", "U32", "I32"), 4)
    | dict.fromkeys(("BF16", "F16", "U16", "I16"), 2)
    | dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1)
)


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes lie in a file."""

    dtype: str  # "F32", "BF16" …
    shape: tuple[int, ...]
    start: int  # from the start of the file
    nbytes: int
    #: of a pickled view whose values do not lie in order: values to the next along each axis
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Header:
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path | str) -> Header:
    """Name → where the tensor lies, after every check. FileError says what is wrong."""
    path = Path(path)

    def fail(what: str) -> FileError:
        return FileError(
            f"{path}: {what}",
            rule="so it is no whole safetensors file",
            next="fetch or export the file again and compare its size with the source's",
        )

    if not path.is_file():
        raise FileError(f"{path}", rule="is no file", next="check the path")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2:
            raise fail(f"{size} bytes without a header")
        if length > min(HEADER_LIMIT_BYTES, size - 8):
            raise fail(f"the header should have {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise fail(f"the header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise fail("the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(one) is str for one in metadata.values()):
        raise fail("__metadata__ is no mapping of texts")

    entries: dict[str, Entry] = {}
    for name, value in header.items():
        entries[name] = _entry(name, value, 8 + length, fail)
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != at:
            raise fail(f"tensor {name!r} starts at byte {entry.start:,} where {at:,} was due")
        at += entry.nbytes
    if at != size:
        raise fail(f"its tensors end at byte {at:,}, the file at {size:,}")
    return Header(entries, metadata)


def _entry(name: str, value: Any, data: int, fail: Callable[[str], FileError]) -> Entry:
    """One tensor's description; data: where the tensors begin."""
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        whole = [*shape, start, end]
    except (TypeError, KeyError, ValueError):
        raise fail(f"tensor {name!r} is described by {str(value)[:200]}") from None
    if not all(type(n) is int and 0 <= n < 2**63 for n in whole):
        raise fail(f"tensor {name!r} has the shape {shape} and the offsets {start}, {end}")
    width = WIDTHS.get(dtype, 0) if isinstance(dtype, str) else 0
    if not width:
        raise fail(f"tensor {name!r} is of the unknown type {dtype!r}")
    nbytes = math.prod(shape) * width
    if nbytes >= 2**63 or end - start != nbytes:
        raise fail(f"tensor {name!r}, {dtype} {shape}, takes {nbytes:,} bytes, not {end - start:,}")
    return Entry(dtype, tuple(shape), data + start, nbytes)


def write(
    path: Path | str,
    plan: Mapping[str, tuple[str, tuple[int, ...]]],
    tensor: Callable[[str], memoryview],
    metadata: Mapping[str, str],
) -> None:
    """Write a file, whole or not at all.

    plan: name → (dtype, shape). tensor: asked for each name's bytes when its turn comes.
    """
    order = list(WIDTHS)
    names = sorted(plan, key=lambda name: (order.index(plan[name][0]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        dtype, shape = plan[name]
        end = at + math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            begin, end = header[name]["data_offsets"]
            data = tensor(name)
            assert data.nbytes == end - begin, f"{name}: {data.nbytes} bytes, planned {end - begin}"
            file.write(data)
