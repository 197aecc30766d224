"""LLaMA 1–3, SmolLM2 and the many children that keep its shape: Alpaca, Vicuna, later Yis, DeepSeek-LLM …
Aquila, too, which calls it by a model_type of its own.

Config: https://huggingface.co/docs/transformers/model_doc/llama. Meta rotates interleaved pairs;
Hugging Face's q and k rows are reordered to the half style, GGUF's are as Meta's.
"""

from __future__ import annotations

from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import GGUF_ROTATING, LLAMA_NAMES, Family
from herdbook.model.keys import Keys, read_llama, write_llama


def read(keys: Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias")
    return read_llama(keys, qkv_bias=bias, out_bias=bias, mlp_bias=keys.flag("mlp_bias"))


def write(config: DecoderConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_llama(config) | biases


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    gguf="llama",
    also=("aquila",),
    names=LLAMA_NAMES,
    read=read,
    write=write,
    folds=GGUF_ROTATING,
)
