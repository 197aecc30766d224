"""What every layout of a model on disk comes to: a checkpoint, understood and checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import FamilyError, FileError
from herdbook.files import gguf
from herdbook.model.checkpoint.weights import GGUFWeights, Weights
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.family import Family, unpermute

#: tensors that some checkpoints carry and nothing needs: they can be computed
COMPUTED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope_freqs\.weight|rope\.freqs")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, understood and checked, its weights not yet read."""

    path: Path
    family: Family
    config: DecoderConfig
    source_config: dict[str, Any]  # under Hugging Face's keys
    headless: bool
    #: our name → the source's
    names: dict[str, str] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)  # by our name
    weights: Weights = field(repr=False)
    #: the rows of q and k are in the order of interleaved rotation
    interleaved: bool = False

    def fill(self, name: str, out: Tensor) -> None:
        """One tensor by our name, dequantised, into its final place."""
        source = self.names[name]
        if self.interleaved and (heads := self.family.permuted_heads(name, self.config)):
            out.copy_(unpermute(self.weights.read(source, out.dtype), heads))
        else:
            self.weights.fill(source, out)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same, in memory of its own."""
        out = torch.empty(self.shapes[name], dtype=dtype)
        self.fill(name, out)
        return out

    def dtype(self, name: str) -> torch.dtype:
        """The least type that holds the tensor of this name of ours exactly."""
        return self.weights.dtype(self.names[name])

    def blocks(self, name: str) -> tuple[str, Tensor] | None:
        """A GGUF tensor in blocks of 32: its type and the bytes [rows, B, bytes a block], else None."""
        if not isinstance(self.weights, GGUFWeights):
            return None
        source = self.names[name]
        tensor = self.weights.file.tensors[source]
        if tensor.type not in ("Q4_0", "Q4_1", "Q8_0"):
            return None
        raw = torch.from_numpy(self.weights.file.raw(source))
        if heads := self.family.permuted_heads(name, self.config):
            raw = unpermute(raw, heads)
        rows, columns = tensor.shape
        return tensor.type, raw.view(rows, columns // gguf.BLOCK, -1)


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
        decoder = Decoder(config, headless=headless)
    return {name: tuple(p.shape) for name, p in decoder.named_parameters()}


def check_sizes(where: Path, config: DecoderConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Before a decoder of these axes is laid out: a hostile config could ask for 10⁹ layers."""
    values = sum(map(math.prod, found.values()))
    rows = max(config.vocab, config.ffn, config.heads * config.head_dim)
    if config.layers > len(found) or rows * config.hidden > 64 * values:
        raise FileError(
            f"{where}: the config asks for {config.layers:,} layers, matrices of {rows:,} rows and "
            f"{config.hidden:,} columns",
            rule=f"but the weights are {len(found):,} tensors of {values:,} values in all",
            next="check that config and weights belong together, or fetch the model again",
        )


def check_shapes(
    where: Path,
    expected: dict[str, tuple[int, ...]],
    names: dict[str, str],
    weights: Weights,
    found: dict[str, tuple[int, ...]],
) -> None:
    """Every tensor there, none left over, each in its shape and of numbers."""
    next = "check that config and weights belong together, or fetch the model again"
    for name, shape in expected.items():
        source = names[name]
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
    wanted = set(names.values())
    left = [n for n in found if n not in wanted and not COMPUTED.fullmatch(n)]
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
