"""GGUF, the file format of llama.cpp: one file with metadata, tokenizer and (quantised) tensors.

    "GGUF" version:u32 tensors:u64 keys:u64
    keys × (name, type:u32, value)                      metadata: general.architecture = "llama" …
    tensors × (name, dims:u32, shape:u64…, type:u32, offset:u64)
    padding to general.alignment (32), then the tensors' bytes, each padded alike

Everything is little-endian; a string is length:u64 and UTF-8. Shapes are stored fastest axis first;
here they are turned round to torch's order, rows first. A quantised row is a run of blocks of 32
values. With d, m float16 and codes c:

    Q4_0  d, 16 bytes   x = d·(c − 8)     byte i holds c[i] in its low half, c[i + 16] in its high
    Q4_1  d, m, 16 bytes   x = d·c + m    the same
    Q8_0  d, 32 int8    x = d·c

The file is foreign: magic, version, counts, lengths and extents are checked before they are used, so
that a broken or hostile file ends in a FileError and never in a huge allocation. What is read of a
tensor lies in memory of its own; nothing stays mapped.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from herdbook.errors import FileError
from herdbook.files import kquants
from herdbook.files.atomic import replacing

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
BLOCK = 32  # values that share a scale in Q4_0, Q4_1 and Q8_0
#: the types that Herdbook writes; it reads every type that the gguf package can dequantise
WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")

#: how a block of 32 lies in the file; codes by byte
BLOCKS = {
    "Q4_0": np.dtype([("scale", "<f2"), ("codes", "V16")]),
    "Q4_1": np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("codes", "V16")]),
    "Q8_0": np.dtype([("scale", "<f2"), ("codes", "V32")]),
}

#: its number in a file, and of a block the values and the bytes (ggml.h)
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "F64": (28, 1, 8),
    "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8),
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34), "Q8_1": (9, 32, 40), "Q1_0": (41, 128, 18),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "Q8_K": (15, 256, 292),
    "IQ1_S": (19, 256, 50), "IQ1_M": (29, 256, 56), "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74), "IQ2_S": (22, 256, 82), "IQ3_XXS": (18, 256, 98),
    "IQ3_S": (21, 256, 110), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136),
    "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36),
}  # fmt: skip
_TYPES = {number: name for name, (number, _, _) in TYPES.items()}
_SIZES = {name: size for name, (_, *size) in TYPES.items()}
# value types of the metadata: number → struct format
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"} | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 4, 5, 6, 7, 8, 9, 10, 11
# What a header may hold. Large ones (Gemma 3: 262,144 tokens, 514,906 merges) have 1.3 million values
# in 20 MB, under 50 keys; models of 500 experts name some 1,000 tensors.
_KEYS, _TENSORS, _VALUES, _HEADER_BYTES = 10_000, 100_000, 8_000_000, 256_000_000


@dataclass(frozen=True)
class GGUFTensor:
    name: str
    shape: tuple[int, ...]  # torch's order: rows first
    type: str  # "F32", "Q4_1" …
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GGUF:
    """A file whose header was read; tensors stay on disk."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    mark: tuple[int, int, int]  # which file it was, as far as its directory tells

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def need_same(self) -> None:
        """Raise where another file lies there than the one whose header was read."""
        if _mark(self.path) != self.mark:
            raise FileError(
                f"{self.path}", rule="was changed meanwhile", next="load the model again"
            )

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes as they lie in the file: uint8 [rows…, bytes a row]."""
        t = self.tensors[name]
        return self.rows(name, 0, rows_of(t.shape)).reshape(*t.shape[:-1], -1)

    def rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` of the tensor, all axes but the last taken as one: uint8 [n, bytes]."""
        t = self.tensors[name]
        width = row_bytes(t.type, t.shape[-1])
        count, at = (last - first) * width, t.offset + first * width
        found = np.fromfile(self.path, np.uint8, count, offset=at)
        if len(found) < count:
            raise FileError(f"{self.path}", rule="became shorter meanwhile", next="try again")
        return found.reshape(-1, width)

    def array(self, name: str) -> np.ndarray:
        """The tensor dequantised: float32 in its shape (float16 when stored so)."""
        t = self.tensors[name]
        return dequantise(self.raw(name), t.type).reshape(t.shape)


def rows_of(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def row_bytes(type: str, columns: int) -> int:
    """Bytes of a row of `columns` values."""
    values, size = _SIZES[type]
    return columns // values * size


# --- reading ---------------------------------------------------------------------------------------


class _Reader:
    """A cursor over the mapped file that refuses to step past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)
        self.end = min(self.size, _HEADER_BYTES)
        self.values = 0  # in arrays, so far

    def fail(self, what: str) -> FileError:
        return FileError(
            f"{self.path}: {what}",
            rule="so it is no whole GGUF file",
            next="fetch or export the file again and compare its size with the source's",
        )

    def need(self, count: int) -> None:
        if count > self.end - self.at:
            raise self.fail(
                f"the header wants {count:,} bytes at {self.at:,}, the file has {self.size:,} and "
                f"a header at most {_HEADER_BYTES:,}"
            )

    def scalar(self, kind: int) -> Any:
        form = _SCALARS[kind]
        width = struct.calcsize(form)
        self.need(width)
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += width
        return value

    def string(self) -> str:
        length = self.scalar(_U64)
        self.need(length)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"a name or string at {self.at - length:,} is not UTF-8") from None

    def strings(self, count: int) -> list[str]:
        """As `string`, a hundred thousand times (a vocabulary and its merges) in a tenth of the time."""
        data, at, end, length_at = self.data, self.at, self.end, struct.Struct("<Q").unpack_from
        out = []
        for _ in range(count):
            (length,) = length_at(data, at) if at + 8 <= end else (end,)
            if at + 8 + length > end:
                break
            try:
                out.append(data[at + 8 : at + 8 + length].decode("utf-8"))
            except UnicodeDecodeError:
                break
            at += 8 + length
        self.at = at
        if len(out) < count:
            self.string()  # says what is wrong here
        return out

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.fail(f"metadata of the unknown type {kind}")
        inner, count = self.scalar(_U32), self.scalar(_U64)
        self.values += count
        if self.values > _VALUES:
            raise self.fail(f"its arrays should have {self.values:,} values, at most {_VALUES:,}")
        if inner == _STRING:
            self.need(count * 8)  # each string has at least its length
            return self.strings(count)
        if inner not in _SCALARS:
            raise self.fail(f"an array of the type {inner}")
        dtype = np.dtype("?" if inner == _BOOL else _SCALARS[inner])
        self.need(count * dtype.itemsize)
        values = np.frombuffer(self.data, dtype, count, self.at).tolist()
        self.at += count * dtype.itemsize
        return values


def read(path: Path | str) -> GGUF:
    """Read the header, check it whole, map the tensors. FileError says what is wrong where.

    >>> read("SmolLM2-135M-Instruct.Q4_1.gguf").metadata["general.architecture"]
    'llama'
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}", rule="is no file", next="check the path")
    mark = _mark(path)
    if not mark[1]:  # an empty file cannot be mapped
        raise FileError(f"{path}", rule="is empty", next="fetch it again")
    return _read_once(path, mark)


def _mark(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


@functools.lru_cache(maxsize=2)
def _read_once(path: Path, mark: tuple[int, int, int]) -> GGUF:
    """A file is read by those who want its weights and by those who want its vocabulary."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read(path, data, mark)


def _read(path: Path, data: mmap.mmap, mark: tuple[int, int, int]) -> GGUF:
    r = _Reader(path, data)
    if data[:4] != MAGIC:
        raise FileError(
            f"{path} starts with {bytes(data[:4])!r}",
            rule=f"but a GGUF file starts with {MAGIC!r}",
            next="check that the file is GGUF (not safetensors, nor a web page saved in its place)",
        )
    r.at = 4
    version = r.scalar(_U32)
    if version not in VERSIONS:
        raise FileError(
            f"{path}: GGUF version {version}",
            rule=f"is not one of {VERSIONS} (little-endian)",
            next="convert it anew with a current llama.cpp",
        )
    tensor_count, key_count = r.scalar(_U64), r.scalar(_U64)
    r.need(tensor_count * 24 + key_count * 13)  # the least that so many entries take
    if tensor_count > _TENSORS or key_count > _KEYS:
        raise r.fail(f"{tensor_count:,} tensors and {key_count:,} keys, no model has so many")

    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = r.string()
        if key in metadata:
            raise r.fail(f"the key {key!r} comes twice")
        metadata[key] = r.value(r.scalar(_U32))

    entries = []
    for _ in range(tensor_count):
        name, dims = r.string(), r.scalar(_U32)
        if not 1 <= dims <= 4:
            raise r.fail(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(r.scalar(_U64) for _ in range(dims))[::-1]
        entries.append((name, shape, r.scalar(_U32), r.scalar(_U64)))

    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise r.fail(f"general.alignment is {alignment!r}")
    start = -(-r.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, number, offset in entries:
        if name in tensors:
            raise r.fail(f"tensor {name!r} comes twice")
        type = _TYPES.get(number, f"number {number}")
        if type not in _SIZES:
            raise r.fail(f"tensor {name!r} is of the unknown type {type}")
        values, size = _SIZES[type]
        count = math.prod(shape)
        nbytes = count // values * size
        if count == 0 or shape[-1] % values:
            raise r.fail(f"tensor {name!r} has the shape {shape}, {type} has blocks of {values}")
        if offset % alignment or start + offset + nbytes > r.size:
            raise r.fail(
                f"tensor {name!r} should lie at bytes {start + offset:,} to "
                f"{start + offset + nbytes:,} of a file of {r.size:,}"
            )
        tensors[name] = GGUFTensor(name, shape, type, start + offset, nbytes)
    at = start
    for one in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if one.offset < at:
            raise r.fail(f"tensor {one.name!r} lies at byte {one.offset:,} within another")
        at = one.offset + one.nbytes
    return GGUF(path, metadata, tensors, mark)


# --- values and blocks -----------------------------------------------------------------------------


def dequantise(raw: np.ndarray, type: str, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [rows…, bytes a row] → float32 [rows…, columns]; F16 stays float16 (it is exact).

    out: where they are to be, float32 in their order.
    """
    if type in ("F32", "F16"):
        assert out is None, "they are read where they are to be"
        return raw.view(np.float32 if type == "F32" else np.float16)
    if out is None:
        values, size = _SIZES[type]
        out = np.empty((*raw.shape[:-1], raw.shape[-1] // size * values), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale that is not finite gives NaN
        _dequantise(raw, type, out)
    return out


def _dequantise(raw: np.ndarray, type: str, out: np.ndarray) -> None:
    if type in BLOCKS:
        blocks = raw.view(BLOCKS[type]).reshape(-1)
        codes = blocks["codes"].copy().view(np.uint8).reshape(len(blocks), -1)
        d, flat = blocks["scale"].astype(np.float32)[:, None], out.reshape(-1, BLOCK)
        if type == "Q8_0":
            flat[...] = codes.view(np.int8)
            flat *= d
            return
        m = d * -8 if type == "Q4_0" else blocks["minimum"].astype(np.float32)[:, None]
        flat[:, : BLOCK // 2] = codes & 15
        flat[:, BLOCK // 2 :] = codes >> 4
        flat *= d
        flat += m
    elif type in kquants.DEQUANTISE:
        super_blocks = raw.reshape(-1, _SIZES[type][1])
        kquants.DEQUANTISE[type](super_blocks, out.reshape(-1, kquants.BLOCK))
    else:
        from gguf import (
            quants,
        )  # a package that takes long to import, for the types above not needed
        from gguf.constants import GGMLQuantizationType

        try:
            out[...] = quants.dequantize(raw, GGMLQuantizationType[type])
        except NotImplementedError:
            raise FileError(
                f"tensors of the type {type}",
                rule="cannot be read",
                next="use a file of one of the types " + ", ".join(WRITABLE),
            ) from None


def quantise(values: np.ndarray, type: str) -> np.ndarray:
    """float [rows…, columns] → uint8 [rows…, bytes a row]. Columns must fill whole blocks of 32.

    Q4_1 takes d = (max − min)/15 and m = min of each block, rounds both to float16 as stored, and
    only then picks the codes, so the codes are the nearest for the numbers a reader will use, and
    what comes from a Q4_1 file goes back unchanged: its blocks hold their least value at code 0 and
    their greatest at 15.
    """
    values = np.ascontiguousarray(values, dtype=np.float16 if type == "F16" else np.float32)
    if type in ("F32", "F16"):
        return values.view(np.uint8)
    if type != "Q4_1":
        from gguf import quants
        from gguf.constants import GGMLQuantizationType

        return quants.quantize(values, GGMLQuantizationType[type]).view(np.uint8)
    blocks = values.reshape(-1, BLOCK)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    d16, m16 = ((high - low) / np.float32(15)).astype(np.float16), low.astype(np.float16)
    d, m = d16.astype(np.float32), m16.astype(np.float32)
    steps = np.divide(blocks - m, d, out=np.zeros_like(blocks), where=d != 0)
    codes = np.clip(np.rint(steps), 0, 15).astype(np.uint8)
    packed = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4
    raw = np.concatenate([d16.view(np.uint8), m16.view(np.uint8), packed], axis=1)
    return raw.reshape(*values.shape[:-1], -1)


# --- writing ---------------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _kind(value: Any) -> int:
    """The value type a Python value is stored as: what llama.cpp itself expects for its keys."""
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _U32 if 0 <= value < 2**32 else _U64 if value > 0 else _I64
    if isinstance(value, float):
        return _F32
    assert isinstance(value, str), f"metadata of type {type(value)}"
    return _STRING


def _value(value: Any) -> bytes:
    if not isinstance(value, (list, tuple)):
        kind = _kind(value)
        body = _string(value) if kind == _STRING else struct.pack(_SCALARS[kind], value)
        return struct.pack("<I", kind) + body
    kind = _kind(value[0]) if len(value) else _STRING
    kind = _I32 if kind == _U32 else kind  # arrays of numbers (token types) are int32 by custom
    if kind == _STRING:
        body = b"".join(_string(one) for one in value)
    else:
        body = np.asarray(value, np.dtype("?" if kind == _BOOL else _SCALARS[kind])).tobytes()
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + body


def write(
    path: Path | str,
    metadata: dict[str, Any],
    tensors: Iterable[tuple[str, str, Any]],
    said: Callable[[int], None] | None = None,
) -> None:
    """Write a GGUF file, whole or not at all.

    tensors: (name, type, array). The array is anything with `.shape` that numpy can turn into
    floats; it is asked for its values when its turn comes, one tensor in memory at a time.
    said: told the bytes written after each tensor.
    """
    path, tensors = Path(path), list(tensors)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    head = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    head += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, type, array in tensors:
        shape = tuple(array.shape)
        values, size = _SIZES[type]
        assert shape[-1] % values == 0, f"{name}: rows of {shape[-1]} do not fill {type} blocks"
        form = f"<I{len(shape)}QIQ"
        number = TYPES[type][0]
        head.append(_string(name) + struct.pack(form, len(shape), *shape[::-1], number, offset))
        offset += -(-(math.prod(shape) // values * size) // alignment) * alignment

    def pad(file: BinaryIO) -> None:
        file.write(b"\0" * (-file.tell() % alignment))

    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines(head)
        pad(file)
        for name, type, array in tensors:
            floats = np.asarray(array)
            if not np.isfinite(floats).all():
                raise FileError(
                    f"tensor {name!r} holds values that are not finite",
                    rule="and no model file can be made of them",
                    next="train again with a lower learning rate",
                )
            raw = quantise(floats, type)
            file.write(raw.data if raw.flags.c_contiguous else raw.tobytes())
            pad(file)
            if said is not None:
                said(raw.nbytes)
