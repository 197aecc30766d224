"""Qwen 3 (dense): each head of q and k is normed before the rotation; head_dim is its own number."""

from __future__ import annotations

from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import LLAMA_NAMES, Family
from herdbook.model.gguf_keys import need, write_gguf_llama
from herdbook.model.keys import Keys, read_llama, read_windows, write_llama, write_windows

NAMES = LLAMA_NAMES | {
    "blocks.{n}.attention.q_norm": ("model.layers.{n}.self_attn.q_norm", "blk.{n}.attn_q_norm"),
    "blocks.{n}.attention.k_norm": ("model.layers.{n}.self_attn.k_norm", "blk.{n}.attn_k_norm"),
}


def read(keys: Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias")
    windows = read_windows(keys)
    return read_llama(
        keys, head_dim=128, qk_norm=True, qkv_bias=bias, out_bias=bias, windows=windows
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    return write_llama(config) | write_windows(config) | {"attention_bias": config.qkv_bias}


def write_gguf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    need(not config.qkv_bias, "attention_bias", "llama.cpp's Qwen 3 has no biases")
    return write_gguf_llama(config, source)


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    gguf="qwen3",
    names=NAMES,
    read=read,
    write=write,
    write_gguf=write_gguf,
)
