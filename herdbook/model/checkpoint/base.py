"""What every layout of a model on disk comes to: a checkpoint, understood and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.files import gguf
from herdbook.model.checkpoint.weights import Blocks, GGUFWeights, Weights
from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family, SourceTensor
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

    def fill(self, name: str, out: Tensor) -> None:
        """One tensor by our name, dequantised, into its final place."""
        source = self.names[name]
        if source.fold is None:
            self.weights.fill(source.name, out)
        elif isinstance(self.weights, GGUFWeights) and out.ndim > 1:
            # our rows alone are dequantised: of stacked experts, one
            file = self.weights.file
            raw = self._mine(name, torch.from_numpy(file.raw(source.name))).contiguous()
            values = gguf.dequantise(raw.numpy(), file.tensors[source.name].type)
            out.copy_(torch.from_numpy(values))
        else:
            out.copy_(self._mine(name, self.weights.read(source.name, out.dtype)))

    def _mine(self, name: str, tensor: Tensor) -> Tensor:
        """Our tensor out of the source's."""
        source = self.names[name]
        if source.fold is None:
            return tensor
        rows = [self.shapes[one][0] for one in source.ours]
        mine: Tensor = source.fold.take(tensor, source.ours.index(name), rows, self.config)
        return mine

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same, in memory of its own."""
        out = torch.empty(self.shapes[name], dtype=dtype)
        self.fill(name, out)
        return out

    def dtype(self, name: str) -> torch.dtype:
        """The least type that holds the tensor of this name of ours exactly."""
        return self.weights.dtype(self.names[name].name)

    def blocks(self, name: str) -> Blocks | None:
        """The tensor where the source keeps it in blocks along our rows, else None."""
        source = self.names[name]
        if source.fold is not None and source.fold.transposed:
            return None
        found = self.weights.blocks(source.name)
        return found and found.map(lambda whole: self._mine(name, whole).contiguous())


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
