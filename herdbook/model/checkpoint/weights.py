"""Where a model's tensors lie, and how each comes from there into its final place and type.

A tensor is read in strips of rows: what the loader holds beside the result is some strips, at most one
whole tensor (whose order is not the file's), and the row numbers of folded ones, not a copy of the
model, whatever the layout. Nothing stays mapped, so what was read counts in memory once.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.files import gguf
from herdbook.files.safetensors import Entry
from herdbook.model.at_once import Step

#: of a tensor's bytes that are held besides the result, in the file's type or as dequantised
STRIP_BYTES = 1 << 20
#: held by the step that reads a tensor whole before it is put in its place
WHOLE = threading.RLock()

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
    def steps(self, name: str, out: Tensor, row_of: Tensor | None = None) -> Iterable[Step]:
        """What together puts the tensor's values into `out`, of its shape and of any type.

        row_of: int64 [rows of out], the tensor's row (all axes but the last taken as one) of each of
        out's, where out [rows, columns] holds some of them or has them in another order. Only of a
        tensor that `in_rows`.
        """

    def in_rows(self, name: str) -> bool:
        """Whether the tensor lies in the file row after row."""
        return True

    def fill(self, name: str, out: Tensor) -> None:
        """The tensor's values into `out`, strip after strip."""
        for step in self.steps(name, out):
            step()

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in memory of its own."""
        out = torch.empty(self.shapes[name], dtype=dtype)
        self.fill(name, out)
        return out

    def blocks(
        self, name: str, row_of: Tensor | None = None
    ) -> tuple[Blocks, Iterable[Step]] | None:
        """The tensor where it is kept in blocks that a quantised layer can hold, and what fills them.
        row_of: as in `steps`."""
        return None


@dataclass(frozen=True)
class Pick:
    """Rows `of` a strip become rows `into` of ours."""

    of: slice | Tensor
    into: slice | Tensor

    def put(self, strip: Tensor, ours: Tensor) -> None:
        if isinstance(self.into, slice):
            ours[self.into].copy_(strip[self.of])
        else:
            ours[self.into] = strip[self.of].to(ours.dtype)

    def numpy(self) -> tuple[Any, Any]:
        """The same two as numpy's indices."""
        of, into = (one.numpy() if isinstance(one, Tensor) else one for one in (self.of, self.into))
        return of, into


def picked(rows: int, count: int, row_of: Tensor | None) -> Iterator[tuple[int, int, Pick]]:
    """Strips of at most `count` of a source's rows: the first, the one after the last, and where they
    go. Rows that are not wanted at its ends are left out of a strip."""
    if row_of is None:
        for first in range(0, rows, count):
            last = min(first + count, rows)
            yield first, last, Pick(slice(None), slice(first, last))
        return
    theirs, ours = row_of.sort()
    edges = torch.searchsorted(theirs, torch.arange(0, rows + count, count))
    for some, into in zip(theirs.tensor_split(edges), ours.tensor_split(edges), strict=True):
        if len(some):
            first = int(some[0])
            yield first, int(some[-1]) + 1, Pick(some - first, into)


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

    def in_rows(self, name: str) -> bool:
        return name not in self.axes and not self.parts[name][0].entry.strides

    def steps(self, name: str, out: Tensor, row_of: Tensor | None = None) -> Iterator[Step]:
        stored, parts = self.dtype(name), self.parts[name]
        if name not in self.axes:  # one part, or each machine has the whole
            yield from _steps(out, parts[0], stored, row_of)
            return
        axis, at = self.axes[name], 0
        for part in parts:
            width = part.entry.shape[axis]
            yield from _steps(out.narrow(axis, at, width), part, stored)
            at += width

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Some rows of a tensor that lies in order, in its own type."""
        part = self.parts[name][0]
        entry = part.entry
        out = torch.empty(last - first, *entry.shape[1:], dtype=self.dtype(name))
        _read(part.path, entry.start + first * (entry.nbytes // entry.shape[0]), out)
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
            _fill(file, memoryview(strip), part.path)
            yield strip
            left -= len(strip)


def _steps(
    out: Tensor, part: Part, stored: torch.dtype, row_of: Tensor | None = None
) -> Iterator[Step]:
    """The part's values into `out`, of the same shape (or `row_of` it) and of any type and strides."""
    entry = part.entry
    if not entry.nbytes:
        return
    if entry.strides:
        yield partial(_disordered, out, part, stored)
        return
    ours = out.flatten(0, -2) if out.ndim > 1 else out.view(-1)
    rows = math.prod(entry.shape[:-1]) if len(entry.shape) > 1 else len(ours)
    each = entry.nbytes // rows
    for first, last, pick in picked(rows, max(1, STRIP_BYTES // each), row_of):
        yield partial(
            _strip, ours, part.path, entry.start + first * each, last - first, stored, pick
        )


def _strip(ours: Tensor, path: Path, at: int, count: int, stored: torch.dtype, pick: Pick) -> None:
    """`count` rows that lie at byte `at`."""
    if isinstance(pick.into, slice) and ours.dtype == stored and ours.is_contiguous():
        _read(path, at, ours[pick.into])
        return
    some = torch.empty(count, *ours.shape[1:], dtype=stored)
    _read(path, at, some)
    pick.put(some, ours)


def _disordered(out: Tensor, part: Part, stored: torch.dtype) -> None:
    """Values whose strides are not those of their order."""
    shape, strides = part.entry.shape, part.entry.strides or ()
    with WHOLE:
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        held = torch.empty(span, dtype=stored)
        _read(part.path, part.entry.start, held)
        out.copy_(held.as_strided(shape, strides))


def _read(path: Path, at: int, into: Tensor) -> None:
    """What lies at byte `at` into a contiguous tensor."""
    with path.open("rb", buffering=0) as file:
        file.seek(at)
        _fill(file, as_bytes(into), path)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _fill(file: FileIO, into: memoryview, path: Path) -> None:
    at = 0
    while at < len(into):
        count = file.readinto(into[at:])
        if not count:
            raise FileError(f"{path}", rule="became shorter meanwhile", next="try again")
        at += count


class GGUFWeights(Weights):
    """Values in blocks, dequantised as they are read."""

    def __init__(self, file: gguf.GGUF) -> None:
        self.file, self.files = file, [file.path]
        self.shapes = file.shapes

    def dtype(self, name: str) -> torch.dtype:
        exact = {"F16": torch.float16, "BF16": torch.bfloat16}
        return exact.get(self.file.tensors[name].type, torch.float32)

    def steps(self, name: str, out: Tensor, row_of: Tensor | None = None) -> Iterator[Step]:
        tensor = self.file.tensors[name]
        if tensor.type in ("F32", "F16", "BF16"):
            entry = Entry(tensor.type, tensor.shape, tensor.offset, tensor.nbytes)
            yield from _steps(out, Part(self.file.path, entry), DTYPES[tensor.type], row_of)
            return
        ours = out.view(-1, tensor.shape[-1])
        count = max(1, STRIP_BYTES // (4 * tensor.shape[-1]))
        for first, last, pick in picked(gguf.rows_of(tensor.shape), count, row_of):
            yield partial(self._strip, name, first, last, ours, pick)

    def _strip(self, name: str, first: int, last: int, ours: Tensor, pick: Pick) -> None:
        raw, type = self.file.rows(name, first, last), self.file.tensors[name].type
        if isinstance(pick.into, slice) and ours.dtype == torch.float32:
            gguf.dequantise(raw, type, ours[pick.into].numpy())
        else:
            pick.put(torch.from_numpy(gguf.dequantise(raw, type)), ours)

    def blocks(
        self, name: str, row_of: Tensor | None = None
    ) -> tuple[Blocks, Iterator[Step]] | None:
        tensor = self.file.tensors[name]
        if tensor.type not in gguf.BLOCKS:
            return None
        four = tensor.type != "Q8_0"
        shape = tensor.shape[:-1] if row_of is None else row_of.shape
        shape = (*shape, tensor.shape[-1] // gguf.BLOCK)
        floats = torch.float16 if four else torch.float32
        found = Blocks(
            torch.empty(*shape, 16 if four else 32, dtype=torch.uint8 if four else torch.int8),
            torch.empty(shape, dtype=floats),
            torch.empty(shape, dtype=floats) if four else None,
        )
        return found, self._block_steps(name, found, row_of)

    def _block_steps(self, name: str, found: Blocks, row_of: Tensor | None) -> Iterator[Step]:
        tensor = self.file.tensors[name]
        count = max(1, STRIP_BYTES // gguf.row_bytes(tensor.type, tensor.shape[-1]))
        ours = found.map(lambda one: one.view(-1, *one.shape[len(found.scale.shape) - 1 :]))
        for first, last, pick in picked(gguf.rows_of(tensor.shape), count, row_of):
            yield partial(self._block_strip, name, first, last, ours, pick)

    def _block_strip(self, name: str, first: int, last: int, ours: Blocks, pick: Pick) -> None:
        type = self.file.tensors[name].type
        raw = self.file.rows(name, first, last).view(gguf.BLOCKS[type])
        of, into = pick.numpy()
        codes = ours.codes.numpy()
        codes.view(raw.dtype["codes"])[into] = raw["codes"][of][..., None]
        ours.scale.numpy()[into] = raw["scale"][of]
        if ours.minimum is not None:
            least = raw["minimum"] if type == "Q4_1" else raw["scale"] * np.float16(-8)
            ours.minimum.numpy()[into] = least[of]
