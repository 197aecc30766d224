"""safetensors: the header of a weight file, checked before anything in it is used.

    length:u64 little-endian, JSON {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    …, "__metadata__": {"format": "pt"}}, then the tensors' bytes

The offsets count from the end of the header and must tile the rest of the file exactly: no gap, no
overlap, nothing past the end. Pickled weights (.bin, .pt) are refused: loading one runs its code.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from herdbook.errors import FileError

HEADER_LIMIT_BYTES = 100_000_000  # as in the reference implementation
#: bytes of one value
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1} | {
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Entry:
    dtype: str  # "F32", "BF16" …
    shape: tuple[int, ...]
    start: int  # from the start of the file
    nbytes: int


def pickled(path: Path) -> FileError:
    """The refusal of a pickle."""
    return FileError(
        f"{path}",
        rule="holds pickled weights; loading a pickle can run any code, so Herdbook does not",
        next="use the model's safetensors or GGUF files",
    )


def refuse_pickles(path: Path) -> None:
    """Raise for a pickle, and for a folder whose only weights are pickles."""
    if path.suffix in PICKLES and path.is_file():
        raise pickled(path)
    if path.is_dir():
        kinds = {one.suffix: one for one in sorted(path.iterdir(), reverse=True)}
        found = [one for suffix, one in kinds.items() if suffix in PICKLES]
        if found and not kinds.keys() & {".safetensors", ".gguf"}:
            raise pickled(found[-1])


def read_header(path: Path | str) -> dict[str, Entry]:
    """name → where the tensor lies, after every check. FileError says what is wrong."""
    path = Path(path)

    def fail(what: str) -> FileError:
        return FileError(
            f"{path}: {what}",
            rule="so it is no whole safetensors file",
            next="fetch or export the file again and compare its size with the source's",
        )

    if path.suffix in PICKLES:
        raise pickled(path)
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
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise fail("the header is no JSON") from None
    if not isinstance(header, dict):
        raise fail("the header is no JSON object")
    header.pop("__metadata__", None)

    entries: dict[str, Entry] = {}
    for name, value in header.items():
        try:
            dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
            whole = [*shape, start, end]
        except (TypeError, KeyError, ValueError):
            raise fail(f"tensor {name!r} is described by {value!r}") from None
        if not all(type(n) is int and n >= 0 for n in whole):
            raise fail(f"tensor {name!r} has the shape {shape} and the offsets {start}, {end}")
        nbytes = WIDTHS.get(dtype, 0) if isinstance(dtype, str) else 0
        if not nbytes:
            raise fail(f"tensor {name!r} is of the unknown type {dtype!r}")
        for n in shape:
            nbytes *= n
        if end - start != nbytes:
            raise fail(
                f"tensor {name!r}, {dtype} {shape}, takes {nbytes:,} bytes, not {end - start:,}"
            )
        entries[name] = Entry(dtype, tuple(shape), 8 + length + start, nbytes)
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != at:
            raise fail(f"tensor {name!r} starts at byte {entry.start:,} where {at:,} was due")
        at += entry.nbytes
    if at != size:
        raise fail(f"its tensors end at byte {at:,}, the file at {size:,}")
    return entries
