"""Qwen 1.5, 2 and 2.5: LLaMA's shape with biases on q, k and v; the small ones tie the head.

GGUF keeps its rows as Hugging Face has them (llama.cpp rotates this family in the half style).
"""

from __future__ import annotations

from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import LLAMA_NAMES, Family
from herdbook.model.keys import Keys, read_llama, read_windows, write_llama, write_windows


def read(keys: Keys) -> DecoderConfig:
    keys.taken.add("attention_bias")  # always; GGUF's reading says so, Hugging Face's has no key
    return read_llama(keys, qkv_bias=True, windows=read_windows(keys))


def write(config: DecoderConfig) -> dict[str, Any]:
    return write_llama(config) | write_windows(config)


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf="qwen2",
    names=LLAMA_NAMES,
    read=read,
    write=write,
)
