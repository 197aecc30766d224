"""Where a model's tensors lie, and how each comes from there into its final place and type.

A tensor is read in strips of rows: what the loader holds beside the result is a strip, not a copy of
the model, whatever the layout. Nothing stays mapped, so what was read counts in memory once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.files import gguf
from herdbook.files.safetensors import Entry

#: of a tensor's bytes that are held besides the result, in the file's type or as dequantised
STRIP_BYTES = 1 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks of 32 as Int4Linear or (without minimum) Int8Linear keep it: codes
    [rows, B, 16 or 32], scale and minimum [rows, B]."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Blocks:
        """The same of other rows."""
        minimum = None if self.minimum is None else change(self.minimum)
        return Blocks(change(self.codes), change(self.scale), minimum)


class Weights(ABC):
    """The tensors of a source under the source's names, not yet read."""

    shapes: dict[str, tuple[int, ...]]
    files: list[Path]

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The least type that holds its values exactly."""

    @abstractmethod
    def fill(self, name: str, out: Tensor) -> None:
        """The tensor's values into `out`, of its shape and of any type."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in memory of its own."""
        out = torch.empty(self.shapes[name], dtype=dtype)
        self.fill(name, out)
        return out

    def blocks(self, name: str) -> Blocks | None:
        """The tensor where it is kept in blocks that a quantised layer can hold."""
        return None


@dataclass(frozen=True)
class Part:
    """A tensor, or one machine's part of it, in a file."""

    path: Path
    entry: Entry


class PlainWeights(Weights):
    """Values as they are: safetensors, pickles. axes: along which a tensor's parts are put together."""

    def __init__(
        self, parts: Mapping[str, list[Part]], axes: Mapping[str, int] | None = None
    ) -> None:
        self.parts, self.axes = parts, axes or {}
        self.files = sorted({part.path for some in parts.values() for part in some})
        self.shapes = {name: self._shape(name) for name in parts}

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = list(self.parts[name][0].entry.shape)
        if name in self.axes:
            axis = self.axes[name]
            shape[axis] = sum(part.entry.shape[axis] for part in self.parts[name])
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.parts[name][0].entry.dtype]

    def fill(self, name: str, out: Tensor) -> None:
        stored, parts = self.dtype(name), self.parts[name]
        if name not in self.axes:  # one part, or each machine has the whole
            _read_into(out, parts[0], stored)
            return
        axis, at = self.axes[name], 0
        for part in parts:
            width = part.entry.shape[axis]
            _read_into(out.narrow(axis, at, width), part, stored)
            at += width

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Some rows of a tensor that lies in order, in its own type."""
        part = self.parts[name][0]
        entry = part.entry
        each = entry.nbytes // entry.shape[0]
        shape, nbytes = (last - first, *entry.shape[1:]), (last - first) * each
        some = Entry(entry.dtype, shape, entry.start + first * each, nbytes)
        out = torch.empty(shape, dtype=self.dtype(name))
        _read_into(out, Part(part.path, some), out.dtype)
        return out

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same bytes."""
        a, b = self.parts[one][0], self.parts[other][0]
        if (a.entry.dtype, a.entry.shape) != (b.entry.dtype, b.entry.shape):
            return False
        if a.entry.strides or b.entry.strides:
            dtype = self.dtype(one)
            return torch.equal(self.read(one, dtype), self.read(other, dtype))
        return a == b or all(x == y for x, y in zip(_strips(a), _strips(b), strict=True))


def _strips(part: Part) -> Iterator[bytearray]:
    """The part's bytes in their order."""
    with part.path.open("rb", buffering=0) as file:
        file.seek(part.entry.start)
        left = part.entry.nbytes
        while left:
            strip = bytearray(min(left, STRIP_BYTES))
            _fill(file, memoryview(strip), part)
            yield strip
            left -= len(strip)


def _read_into(out: Tensor, part: Part, stored: torch.dtype) -> None:
    """The part's values into `out`, of the same shape and of any type and strides."""
    entry = part.entry
    if not entry.nbytes:
        return
    with part.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        if entry.strides:
            span = 1 + sum((n - 1) * s for n, s in zip(entry.shape, entry.strides, strict=True))
            held = torch.empty(span, dtype=stored)
            _fill(file, as_bytes(held), part)
            out.copy_(held.as_strided(entry.shape, entry.strides))
            return
        if out.dtype == stored and out.is_contiguous():
            _fill(file, as_bytes(out), part)
            return
        rows = out if out.ndim > 1 else out.view(-1)
        count = max(1, STRIP_BYTES * len(rows) // entry.nbytes)
        strip = torch.empty(min(count, len(rows)), *rows.shape[1:], dtype=stored)
        for first in range(0, len(rows), count):
            into = rows[first : first + count]
            some = strip[: len(into)]
            _fill(file, as_bytes(some), part)
            into.copy_(some)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _fill(file: FileIO, into: memoryview, part: Part) -> None:
    at = 0
    while at < len(into):
        count = file.readinto(into[at:])
        if not count:
            raise FileError(f"{part.path}", rule="became shorter meanwhile", next="try again")
        at += count


class GGUFWeights(Weights):
    """Values in blocks, dequantised as they are read."""

    def __init__(self, file: gguf.GGUF) -> None:
        self.file, self.files = file, [file.path]
        self.shapes = file.shapes

    def dtype(self, name: str) -> torch.dtype:
        exact = {"F16": torch.float16, "BF16": torch.bfloat16}
        return exact.get(self.file.tensors[name].type, torch.float32)

    def fill(self, name: str, out: Tensor) -> None:
        tensor = self.file.tensors[name]
        rows = out.view(-1, tensor.shape[-1])
        count = max(1, STRIP_BYTES // (4 * tensor.shape[-1]))
        for first in range(0, len(rows), count):
            last = min(first + count, len(rows))
            values = gguf.dequantise(self.file.rows(name, first, last), tensor.type)
            rows[first:last] = torch.from_numpy(values)

    def blocks(self, name: str) -> Blocks | None:
        tensor = self.file.tensors[name]
        if tensor.type not in ("Q4_0", "Q4_1", "Q8_0"):
            return None
        raw = torch.from_numpy(self.file.raw(name))
        raw = raw.view(*tensor.shape[:-1], tensor.shape[-1] // gguf.BLOCK, -1)
        heads = 4 if tensor.type == "Q4_1" else 2  # bytes of float16 in front of the codes
        floats, codes = raw[..., :heads].contiguous().view(torch.float16), raw[..., heads:]
        scale = floats[..., 0]
        if tensor.type == "Q8_0":
            return Blocks(codes.contiguous().view(torch.int8), scale.float(), None)
        return Blocks(codes, scale, floats[..., 1] if tensor.type == "Q4_1" else scale * -8)
