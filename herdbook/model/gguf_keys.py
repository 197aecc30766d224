"""What GGUF's metadata says of a model, under Hugging Face's keys and back: what families share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from herdbook.errors import FamilyError
from herdbook.model.config import DecoderConfig, RopeScaling
from herdbook.model.keys import Keys
from herdbook.model.rope import rope_divisors, rope_frequencies

#: Hugging Face's key → GGUF's, without the architecture in front
GGUF_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "sliding_window": "attention.sliding_window",
}


def short(value: Any) -> Any:
    """A float32's shortest decimal: 9.999999747378752e-06 is what 1e-05 became."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def read_gguf_llama(
    keys: Keys, source: dict[str, Any], has: Callable[[str], bool], *, partial: bool = False
) -> None:
    """What LLaMA-shaped families say beyond the table: biases, widths, experts, rotary scaling.

    partial: a part of each head may turn.
    """
    if isinstance(source.get("num_key_value_heads"), list):
        raise keys.refuse("the layers have different numbers of heads", "this is not supported")
    source["attention_bias"] = has("blocks.0.attention.q.bias")
    source["mlp_bias"] = has("blocks.0.mlp.gate.bias")

    width = _head_width(source)
    if partial:
        source["partial_rotary_factor"] = keys.take("rope.dimension_count", width) / width
        keys.source = {k: v for k, v in keys.source.items() if k != "rope.dimension_count"}
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.take(key, width) != width:
            raise keys.refuse(f"{key} is {keys.take(key)}", f"but a head has {width} dimensions")
    if keys.take("expert_count", 0):
        source["num_local_experts"] = keys.take("expert_count")
        source["num_experts_per_tok"] = keys.take("expert_used_count")
    read_gguf_scaling(keys, source)
    keys.taken |= {"expert_used_count", "tensor_data_layout"}


def _head_width(source: dict[str, Any]) -> int:
    heads = source.get("num_attention_heads", 1)
    return int(source.get("head_dim") or source.get("hidden_size", 0) // heads)


def read_gguf_scaling(keys: Keys, source: dict[str, Any]) -> None:
    """GGUF's keys of a rotary scaling; LLaMA 3's is a tensor instead."""
    kind, factor = keys.take("rope.scaling.type", "none"), keys.take("rope.scaling.factor", 1.0)
    if kind in ("linear", "yarn") and factor != 1.0:
        source["rope_scaling"] = {"rope_type": kind, "factor": short(factor)}
        if kind == "yarn":
            original = keys.take("rope.scaling.original_context_length")
            source["rope_scaling"]["original_max_position_embeddings"] = original
    elif kind not in ("none", "linear", "yarn"):
        raise keys.refuse(f"rope.scaling.type is {kind!r}", "known are: none, linear, yarn")
    keys.taken |= {"rope.scaling.finetuned", "rope.scaling.original_context_length"}


def need(holds: bool, what: str, why: str) -> None:
    """Raise where llama.cpp would not load the file, or compute another model from it."""
    if not holds:
        raise FamilyError(
            f"a model with {what}",
            rule=f"cannot be written as GGUF: {why}",
            next="export it as a Hugging Face folder (--to hf)",
        )


def need_activation(config: DecoderConfig, known: str) -> None:
    """GGUF has no key for it: llama.cpp takes the architecture's own (and computes any GELU by tanh)."""
    what = f"the activation {config.activation}"
    need(config.activation == known, what, f"there the architecture's is always {known}")


def need_full_heads(config: DecoderConfig) -> None:
    """llama.cpp's ChatGLM takes the heads' width together for the hidden state's."""
    what = f"{config.heads} heads of {config.head_dim} and a hidden state of {config.hidden}"
    full = config.heads * config.head_dim == config.hidden
    need(full, what, "the heads of llama.cpp's ChatGLM fill the hidden state")


def folded_for_gguf(config: DecoderConfig) -> DecoderConfig:
    """The axes that a GGUF's metadata has to say: the others go into its tensors.

    LLaMA 3's scaling is the tensor rope_freqs; a normed head is written normed; a dynamic scaling
    does nothing in the context.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind in ("llama3", "dynamic"):
        scaling = None
    return dataclasses.replace(config, rope_scaling=scaling, head_norm=False)


def write_gguf_llama(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The inverse of read_gguf_llama. source: the configuration under Hugging Face's keys."""
    metadata: dict[str, Any] = {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rope_dim or config.head_dim,
    }
    if config.experts:
        metadata |= {"expert_count": config.experts, "expert_used_count": config.experts_used}
    return metadata | write_gguf_scaling(config)


def write_gguf_scaling(config: DecoderConfig) -> dict[str, Any]:
    scaling = folded_for_gguf(config).rope_scaling
    if scaling is None:
        return {}
    metadata = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.original_max_pos:
        metadata["rope.scaling.original_context_length"] = scaling.original_max_pos
    return metadata


def llama3_from_divisors(divisors: np.ndarray, config: DecoderConfig) -> RopeScaling | None:
    """LLaMA 3's scaling, recognised in the divisors that GGUF keeps as `rope_freqs.weight`.

    The greatest divisor is the factor; a frequency between tells the original context, since Meta's
    low and high (1 and 4) are the same in all its models. None when the divisors are something else.
    """
    factor = round(float(divisors.max()), 4)
    plain = rope_frequencies(config)
    between = (divisors > 1) & (divisors < divisors.max())
    if factor <= 1 or not between.any():
        return None
    i = int(between.nonzero()[0][0])
    kept = (1 / float(divisors[i]) - 1 / factor) / (1 - 1 / factor)
    original = round((1 + kept * 3) * 2 * math.pi / float(plain[i]))
    scaling = RopeScaling("llama3", factor, original, 1.0, 4.0)
    same = np.allclose(rope_divisors(plain, scaling, config), divisors, rtol=1e-3)
    return scaling if same else None
