"""InternLM 2 and 2.5: LLaMA's shape under other names, with q, k and v packed by group.

`wqkv` holds, for each key/value head, [its query heads | k | v]; w1 is the gate, w3 up, w2 down. GGUF
has them split and its rows as Meta's. Source: internlm's modeling_internlm2.py, 2024.
"""

from __future__ import annotations

from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import GGUF_ROTATING, LLAMA_NAMES, Family
from herdbook.model.folds import QKV, Fold, qkv_by_group
from herdbook.model.keys import Keys, read_llama, write_llama

PACKED = "model.layers.{n}.attention.wqkv"
HF = {
    "embed": "model.tok_embeddings",
    "blocks.{n}.attention_norm": "model.layers.{n}.attention_norm",
    "blocks.{n}.attention.q": PACKED,
    "blocks.{n}.attention.k": PACKED,
    "blocks.{n}.attention.v": PACKED,
    "blocks.{n}.attention.o": "model.layers.{n}.attention.wo",
    "blocks.{n}.mlp_norm": "model.layers.{n}.ffn_norm",
    "blocks.{n}.mlp.gate": "model.layers.{n}.feed_forward.w1",
    "blocks.{n}.mlp.up": "model.layers.{n}.feed_forward.w3",
    "blocks.{n}.mlp.down": "model.layers.{n}.feed_forward.w2",
    "norm": "model.norm",
    "head": "output",
}
NAMES = {ours: (HF[ours], gguf) for ours, (_, gguf) in LLAMA_NAMES.items()}


def read(keys: Keys) -> DecoderConfig:
    bias = keys.flag("bias", keys.flag("attention_bias"))  # the second is how GGUF is read
    return read_llama(keys, qkv_bias=bias, out_bias=bias)


def write(config: DecoderConfig) -> dict[str, Any]:
    return write_llama(config) | {"bias": config.qkv_bias}


FAMILY = Family(
    model_type="internlm2",
    architecture="InternLM2ForCausalLM",
    gguf="internlm2",
    names=NAMES,
    read=read,
    write=write,
    folds=GGUF_ROTATING | {PACKED: Fold(QKV, qkv_by_group)},
)
