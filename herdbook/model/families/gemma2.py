"""Gemma 2: Gemma with a norm before and after each part, scores and logits capped by tanh, and a
window on every other layer, the first one included.

Scores are scaled by query_pre_attn_scalar^-½, which only in the 27B is not the head's width; GGUF has
no key for it, and llama.cpp knows that model by its 46 layers.
Config: https://huggingface.co/docs/transformers/model_doc/gemma2; Gemma Team, 2024, arXiv:2408.00118.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.families.gemma import gguf_norms, read_gemma, write_gemma
from herdbook.model.family import LLAMA_NAMES, Family
from herdbook.model.gguf_keys import GGUF_KEYS, read_gguf_llama, write_gguf_llama
from herdbook.model.keys import Keys

LAYER = "model.layers.{n}"
NAMES = LLAMA_NAMES | {
    "blocks.{n}.after_attention_norm": (
        f"{LAYER}.post_attention_layernorm",
        "blk.{n}.post_attention_norm",
    ),
    "blocks.{n}.mlp_norm": (f"{LAYER}.pre_feedforward_layernorm", "blk.{n}.ffn_norm"),
    "blocks.{n}.after_mlp_norm": (f"{LAYER}.post_feedforward_layernorm", "blk.{n}.post_ffw_norm"),
}
KINDS = {"full_attention", "sliding_attention"}
LAYERS_27B = 46


def read_pattern(keys: Keys, every: int, window: int) -> tuple[int | None, ...]:
    """layer_types; without them each layer has the window but every `every`-th, counted from 1."""
    layers, window = keys.number("num_hidden_layers"), keys.number("sliding_window", window)
    types = keys.take("layer_types")
    if types is None:
        return tuple(window if (i + 1) % every else None for i in range(layers))
    if len(types) != layers or not set(types) <= KINDS:
        raise keys.refuse(f"layer_types is {types}", f"must be {layers} of {', '.join(KINDS)}")
    return tuple(window if one == "sliding_attention" else None for one in types)


def write_pattern(config: DecoderConfig) -> dict[str, Any]:
    sizes = {w for w in config.windows if w is not None}
    assert len(sizes) < 2, "the layers' windows differ in size"
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return {"layer_types": kinds} | ({"sliding_window": sizes.pop()} if sizes else {})


def read(keys: Keys) -> DecoderConfig:
    keys.taken |= {"cache_implementation", "sliding_window_size"}  # the latter never read
    return read_gemma(
        keys,
        norm_place="sandwich",
        windows=read_pattern(keys, 2, 4096),
        attention_scale=keys.real("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=softcap(keys, "attn_logit_softcapping", 50.0),
        logit_softcap=softcap(keys, "final_logit_softcapping", 30.0),
    )


def softcap(keys: Keys, key: str, default: float) -> float:
    """0: none, which is a null in the source; `default` only where the key is missing."""
    if key not in keys.source:
        return default
    return 0.0 if keys.take(key) is None else keys.real(key)


def write(config: DecoderConfig) -> dict[str, Any]:
    return (
        write_gemma(config)
        | write_pattern(config)
        | {
            "query_pre_attn_scalar": scalar(config),
            "attn_logit_softcapping": config.attention_softcap or None,
            "final_logit_softcapping": config.logit_softcap or None,
        }
    )


def scalar(config: DecoderConfig) -> int:
    """query_pre_attn_scalar, a whole number."""
    return round(config.attention_scale**-2)


def read_gguf_scale(source: dict[str, Any], layers_27b: int) -> None:
    """llama.cpp scales by the head's width, but by hidden / heads in the model of 27B."""
    if source["num_hidden_layers"] == layers_27b:
        scale = source["hidden_size"] // source["num_attention_heads"]
    else:
        scale = source["head_dim"]
    source["query_pre_attn_scalar"] = scale


def read_gguf(keys: Keys, source: dict[str, Any], has: Callable[[str], bool]) -> None:
    read_gguf_scale(source, LAYERS_27B)
    read_gguf_llama(keys, source, has)


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    gguf="gemma2",
    names=NAMES,
    read=read,
    write=write,
    gguf_keys=GGUF_KEYS
    | {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    read_gguf=read_gguf,
    write_gguf=write_gguf_llama,
    folds=gguf_norms(NAMES),
)
