"""Gemma 3 (text): Gemma 2 without caps, with normed q and k, and five layers with a window, whose
rotation has a base of its own (10,000, never scaled), to one that sees all (base 1,000,000).

From 4B on it is published as `gemma3`, with a vision tower beside it: of that the text part is read,
and saved as what it then is, a gemma3_text. Its text_config says only what differs from the 4B.

Config: https://huggingface.co/docs/transformers/model_doc/gemma3; Gemma Team, 2025, arXiv:2503.19786.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.families import gemma2
from herdbook.model.families.gemma import gguf_norms, read_gemma, write_gemma
from herdbook.model.family import Family
from herdbook.model.gguf_keys import GGUF_KEYS, read_gguf_llama, write_gguf_llama
from herdbook.model.keys import Keys

LAYER = "model.layers.{n}"
NAMES = gemma2.NAMES | {
    "blocks.{n}.attention.q_norm": (f"{LAYER}.self_attn.q_norm", "blk.{n}.attn_q_norm"),
    "blocks.{n}.attention.k_norm": (f"{LAYER}.self_attn.k_norm", "blk.{n}.attn_k_norm"),
}
GLOBAL_BASE, LOCAL_BASE = 1_000_000.0, 10_000.0
LAYERS_27B = 62
#: what a `gemma3` does not say
DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


def read(keys: Keys) -> DecoderConfig:
    if "text_config" in keys.source:
        text = Keys(DEFAULTS | keys.take("text_config"), f"{keys.where} text_config")
        config = read(text)
        text.finish()
        keys.taken |= keys.source.keys()  # the rest is of the eyes
        return config
    every = keys.number("sliding_window_pattern", keys.take("_sliding_window_pattern", 6))
    keys.taken |= {"cache_implementation"}
    return read_gemma(
        keys,
        norm_place="sandwich",
        qk_norm=True,
        windows=gemma2.read_pattern(keys, every, 4096),
        rope_local_base=read_local_base(keys),
        rope_base=GLOBAL_BASE,
        attention_scale=keys.real("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=gemma2.softcap(keys, "attn_logit_softcapping", 0.0),
        logit_softcap=gemma2.softcap(keys, "final_logit_softcapping", 0.0),
    )


def read_local_base(keys: Keys) -> float:
    """The base of layers with a window. transformers 5 puts both rotations into rope_parameters: of
    these only the one of layers that see all is left there."""
    base = keys.real("rope_local_base_freq", LOCAL_BASE)
    both = keys.source.get("rope_parameters") or {}
    if "full_attention" not in both:
        return base
    rope = Keys(both, f"{keys.where} rope_parameters")
    keys.source = keys.source | {"rope_parameters": rope.take("full_attention")}
    local = Keys(rope.take("sliding_attention", {}), f"{rope.where} sliding_attention")
    rope.finish()
    local.choice("rope_type", {"default": None}, "default")
    base = local.real("rope_theta", base)
    local.finish()
    return base


def write(config: DecoderConfig) -> dict[str, Any]:
    return (
        write_gemma(config)
        | gemma2.write_pattern(config)
        | {
            "rope_local_base_freq": config.rope_local_base,
            "query_pre_attn_scalar": gemma2.scalar(config),
            "attn_logit_softcapping": config.attention_softcap or None,
            "final_logit_softcapping": config.logit_softcap or None,
        }
    )


def read_gguf(keys: Keys, source: dict[str, Any], has: Callable[[str], bool]) -> None:
    gemma2.read_gguf_scale(source, LAYERS_27B)
    source["rope_local_base_freq"] = keys.real("rope.freq_base_swa", LOCAL_BASE)
    read_gguf_llama(keys, source, has)


def write_gguf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    return write_gguf_llama(config, source) | {"rope.freq_base_swa": config.rope_local_base}


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    also=("gemma3",),
    gguf="gemma3",
    names=NAMES,
    read=read,
    write=write,
    gguf_keys=GGUF_KEYS,
    read_gguf=read_gguf,
    write_gguf=write_gguf,
    folds=gguf_norms(NAMES),
)
