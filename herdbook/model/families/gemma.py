"""Gemma 1: LLaMA's shape with norms of 1 + w, a gated GELU, and an embedding times √hidden that is
also the head.

GGUF stores 1 + w, so 1 is taken off when it is read, and its rows are Hugging Face's.
Config: https://huggingface.co/docs/transformers/model_doc/gemma.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from herdbook.model.config import Activation, DecoderConfig
from herdbook.model.family import LLAMA_NAMES, Family, Names
from herdbook.model.folds import Fold
from herdbook.model.keys import Keys, read_llama, write_llama

#: Google's first files say "gelu" and mean its approximation
TANH: dict[str, Activation] = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def read_gemma(keys: Keys, **axes: Any) -> DecoderConfig:
    """What the three generations share; `axes` are the generation's own."""
    for key in ("hidden_act", "hidden_activation"):
        keys.choice(key, TANH, "gelu_pytorch_tanh")
    bias = keys.flag("attention_bias")
    return read_llama(
        keys,
        norm="rms1p",
        activation="gelu_tanh",
        embed_scale=keys.number("hidden_size") ** 0.5,
        head_dim=256,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        **axes,
    )


def write_gemma(config: DecoderConfig) -> dict[str, Any]:
    known = write_llama(config)
    act = known.pop("hidden_act")
    return known | {"hidden_activation": act, "attention_bias": config.qkv_bias}


def gguf_norms(names: Names) -> Mapping[str, Fold]:
    """Every norm of the family is kept as 1 + w."""
    return {gguf: Fold((ours,), plus=-1.0) for ours, (_, gguf) in names.items() if "norm" in ours}


def write(config: DecoderConfig) -> dict[str, Any]:
    known = write_gemma(config)
    return known | {"hidden_act": known["hidden_activation"]}


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    gguf="gemma",
    names=LLAMA_NAMES,
    read=read_gemma,
    write=write,
    folds=gguf_norms(LLAMA_NAMES),
)
