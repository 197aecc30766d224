"""What a source must hold for its configuration, told before any weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herdbook.errors import FamilyError, FileError
from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family, SourceTensor

#: tensors that some checkpoints carry and nothing needs, as they can be computed: rotary frequencies,
#: and the causal masks of 2019–2023 (GPT-2's attn.bias is one)
COMPUTED = re.compile(
    r"(.*\.)?rotary(_pos)?_emb\.inv_freq|rope_freqs\.weight|rope\.freqs"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"  # of early T5s
    r"|.*\.attn\.(bias|masked_bias|causal_mask|embed_positions)|.*\.attention\.(bias|masked_bias)"
)


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


def source_shapes(
    expected: Mapping[str, tuple[int, ...]], names: Mapping[str, SourceTensor]
) -> dict[str, tuple[int, ...]]:
    """The source's tensors of such a model, in our order, each once, and their shapes."""
    sources = {one.name: one for one in names.values()}
    return {
        name: one.fold.shape([expected[ours] for ours in one.ours])
        if one.fold
        else expected[one.ours[0]]
        for name, one in sources.items()
    }


def check_sizes(where: Path, config: DecoderConfig, found: Mapping[str, tuple[int, ...]]) -> None:
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


def check_names(
    where: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Every tensor of the source there, none left over, each in its shape."""
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
