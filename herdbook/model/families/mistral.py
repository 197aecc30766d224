"""Mistral 7B and children (Zephyr, OpenHermes …): LLaMA's shape with a sliding window everywhere.

A window of 4,096 lets a token see itself and 4,095 before it. From version 0.2 on the window is null.
In GGUF it goes under the architecture "llama", told apart by its window.
"""

from __future__ import annotations

from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import GGUF_ROTATING, LLAMA_NAMES, Family
from herdbook.model.keys import Keys, read_llama, write_llama


def read(keys: Keys) -> DecoderConfig:
    window = keys.take("sliding_window", None if "sliding_window" in keys.source else 4096)
    layers = keys.number("num_hidden_layers")
    return read_llama(keys, windows=() if window is None else (window,) * layers)


def write(config: DecoderConfig) -> dict[str, Any]:
    return write_llama(config) | {"sliding_window": config.window(0)}


def gguf_note(config: DecoderConfig) -> str:
    window = config.window(0)
    if window is None:
        return ""
    return f"llama.cpp has no sliding window here: past {window:,} tokens its replies differ"


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    gguf="llama",
    names=LLAMA_NAMES,
    read=read,
    write=write,
    gguf_note=gguf_note,
    folds=GGUF_ROTATING,
)
