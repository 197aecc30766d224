"""What every layout of a model on disk comes to: a checkpoint, understood and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import FamilyError, FileError
from herdbook.model.checkpoint.steps import Step
from herdbook.model.checkpoint.weights import WHOLE, Blocks, Weights
from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family, SourceTensor
from herdbook.model.folds import Fold
from herdbook.model.modules import build

#: tensors that some checkpoints carry and nothing needs, as they can be computed: rotary frequencies,
#: and the causal masks of 2019–2023 (GPT-2's attn.bias is one)
COMPUTED = re.compile(
    r"(.*\.)?rotary(_pos)?_emb\.inv_freq|rope_freqs\.weight|rope\.freqs"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"  # of early T5s
    r"|.*\.attn\.(bias|masked_bias|causal_mask|embed_positions)|.*\.attention\.(bias|masked_bias)"
)


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
        return fold.row_of(*self._part(name), self.config)

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


def read_config(family: Family, source: dict[str, Any], where: str) -> DecoderConfig:
    """The family's reading; a value of a kind that it does not expect is the file's fault."""
    try:
        return family.config(source, where)
    except (TypeError, ValueError, ArithmeticError, AttributeError, AssertionError) as error:
        raise FamilyError(
            f"{where}: {error}",
            rule=f"so a value in it is not what a {family.model_type} model has there",
            next="check it against the original's, or fetch the model again",
        ) from error


def expected_shapes(config: DecoderConfig, *, headless: bool = False) -> dict[str, tuple[int, ...]]:
    """Our name → shape, for every tensor of such a decoder."""
    with torch.device("meta"):
        decoder = build(config, headless=headless)
    return {name: tuple(p.shape) for name, p in decoder.named_parameters()}


def source_shapes(
    expected: dict[str, tuple[int, ...]], names: dict[str, SourceTensor]
) -> dict[str, tuple[int, ...]]:
    """The source's tensors of such a model, in our order, each once, and their shapes."""
    sources = {one.name: one for one in names.values()}
    return {
        name: one.fold.shape([expected[ours] for ours in one.ours])
        if one.fold
        else expected[one.ours[0]]
        for name, one in sources.items()
    }


def check_sizes(where: Path, config: DecoderConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Before a decoder of these axes is laid out: a hostile config could ask for 10⁹ layers, or
    for 10⁹ experts in one. A file may stack a layer's experts in one tensor.
    """
    values = sum(map(math.prod, found.values()))
    rows = max(config.vocab, config.ffn, config.heads * config.head_dim)
    if config.layers > len(found) or rows * config.hidden > 64 * values:
        raise FileError(
            f"{where}: the config asks for {config.layers:,} layers, matrices of {rows:,} rows and "
            f"{config.hidden:,} columns",
            rule=f"but the weights are {len(found):,} tensors of {values:,} values in all",
            next="check that config and weights belong together, or fetch the model again",
        )
    experts = config.expert_layers * config.experts
    if experts > 64 * len(found) or experts * 2 * config.ffn * config.hidden > values:
        raise FileError(
            f"{where}: the config asks for {config.experts:,} experts in each of "
            f"{config.expert_layers:,} layers, of {config.ffn:,} × {config.hidden:,} at least twice",
            rule=f"but the weights are {len(found):,} tensors of {values:,} values in all",
            next="check that config and weights belong together, or fetch the model again",
        )


def check_shapes(
    where: Path,
    expected: dict[str, tuple[int, ...]],
    weights: Weights,
    found: dict[str, tuple[int, ...]],
) -> None:
    """Every tensor of the source there, none left over, each in its shape and of numbers."""
    next = "check that config and weights belong together, or fetch the model again"
    for source, shape in expected.items():
        if source not in found:
            raise FileError(f"{where}: tensor {source!r} is missing", rule="", next=next)
        if found[source] != shape:
            raise FileError(
                f"{where}: tensor {source!r} has the shape {list(found[source])}",
                rule=f"but the config asks for {list(shape)}",
                next=next,
            )
        if not weights.dtype(source).is_floating_point:
            raise FileError(
                f"{where}: tensor {source!r} is of whole numbers ({weights.dtype(source)})",
                rule="but weights are of real ones",
                next="use the model's files before they were quantised, or a GGUF of it",
            )
    left = [n for n in found if n not in expected and not COMPUTED.fullmatch(n)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise FileError(
            f"{where}: tensor {left[0]!r}{more}",
            rule="has no place in a model of this config",
            next=next,
        )


def check_vocabulary(config: DecoderConfig, tokenizer_size: int) -> None:
    """Raise where the tokenizer knows ids that the embedding has no row for. Spare rows are fine."""
    if tokenizer_size > config.vocab:
        raise FileError(
            f"the tokenizer has {tokenizer_size:,} ids",
            rule=f"but the model's embedding has only {config.vocab:,} rows",
            next="use the tokenizer that belongs to the model",
        )
