"""What every layout of a model on disk comes to: a checkpoint, understood and checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.model.at_once import Step
from herdbook.model.checkpoint.weights import WHOLE, Blocks, Weights
from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family, SourceTensor
from herdbook.model.folds import Fold
from herdbook.model.modules import build
from herdbook.model.sources import check_names


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, understood and checked, its weights not yet read."""

    path: Path
    family: Family
    config: DecoderConfig
    source_config: dict[str, Any]  # under Hugging Face's keys
    headless: bool
    #: our name → the source's tensor that holds it
    names: dict[str, SourceTensor] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)  # by our name
    weights: Weights = field(repr=False)

    def steps(self, name: str, out: Tensor) -> Iterable[Step]:
        """What together puts one tensor by our name, dequantised, into its final place."""
        source = self.names[name]
        fold = source.fold
        if fold is None:
            return self.weights.steps(source.name, out)
        as_rows = out.ndim == 2 and not fold.transposed and not fold.plus
        if as_rows and self.weights.in_rows(source.name):
            return self.weights.steps(source.name, out, self._row_of(name, fold))
        return [partial(self._unfold, name, fold, out)]

    def _unfold(self, name: str, fold: Fold, out: Tensor) -> None:
        source = self.names[name]
        with WHOLE:
            whole = self.weights.read(source.name, out.dtype)
            out.copy_(fold.take(whole, *self._part(name), self.config))

    def _part(self, name: str) -> tuple[int, list[int]]:
        """Which of its source's parts a tensor is, and how many rows each has."""
        ours = self.names[name].ours
        return ours.index(name), [self.shapes[one][0] for one in ours]

    def _row_of(self, name: str, fold: Fold) -> Tensor:
        return torch.from_numpy(fold.row_of(*self._part(name), self.config))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same, in memory of its own."""
        out = torch.empty(self.shapes[name], dtype=dtype)
        for step in self.steps(name, out):
            step()
        return out

    def dtype(self, name: str) -> torch.dtype:
        """The least type that holds the tensor of this name of ours exactly."""
        return self.weights.dtype(self.names[name].name)

    def blocks(self, name: str) -> tuple[Blocks, Iterable[Step]] | None:
        """The tensor where the source keeps it in blocks along our rows, and what fills them."""
        source = self.names[name]
        if source.fold is None:
            return self.weights.blocks(source.name)
        if source.fold.transposed:
            return None
        return self.weights.blocks(source.name, self._row_of(name, source.fold))


def expected_shapes(config: DecoderConfig, *, headless: bool = False) -> dict[str, tuple[int, ...]]:
    """Our name → shape, for every tensor of such a decoder."""
    with torch.device("meta"):
        decoder = build(config, headless=headless)
    return {name: tuple(p.shape) for name, p in decoder.named_parameters()}


def check_shapes(
    where: Path,
    expected: dict[str, tuple[int, ...]],
    weights: Weights,
    found: dict[str, tuple[int, ...]],
) -> None:
    """Every tensor of the source there, none left over, each in its shape and of numbers."""
    check_names(where, expected, found)
    for source in expected:
        if not weights.dtype(source).is_floating_point:
            raise FileError(
                f"{where}: tensor {source!r} is of whole numbers ({weights.dtype(source)})",
                rule="but weights are of real ones",
                next="use the model's files before they were quantised, or a GGUF of it",
            )
