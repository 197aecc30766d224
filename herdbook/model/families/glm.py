"""GLM-4 under transformers' names (`glm`): LLaMA's shape with biases on q, k and v, gate and up in one
matrix, and pairs side by side that turn in the first half of each head.

The same models under Zhipu's own names are in chatglm2.py. GGUF ("chatglm") keeps its rows.
Config: https://huggingface.co/docs/transformers/model_doc/glm.
"""

from __future__ import annotations

import functools
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import LLAMA_NAMES, Family
from herdbook.model.folds import K_ROTATING, Q_ROTATING, Fold
from herdbook.model.gguf_keys import need_full_heads, read_gguf_llama, write_gguf_llama
from herdbook.model.keys import Keys, read_llama, write_llama

UP_HF, UP_GGUF = "model.layers.{n}.mlp.gate_up_proj", "blk.{n}.ffn_up"
PACKED = ("blocks.{n}.mlp.gate", "blocks.{n}.mlp.up")
NAMES = LLAMA_NAMES | dict.fromkeys(PACKED, (UP_HF, UP_GGUF))
Q, K = Fold(("blocks.{n}.attention.q",), Q_ROTATING), Fold(("blocks.{n}.attention.k",), K_ROTATING)
FOLDS = {
    "model.layers.{n}.self_attn.q_proj": Q,
    "model.layers.{n}.self_attn.k_proj": K,
    "blk.{n}.attn_q": Q,
    "blk.{n}.attn_k": K,
    UP_HF: Fold(PACKED),
    UP_GGUF: Fold(PACKED),
}


def read(keys: Keys, **axes: Any) -> DecoderConfig:
    rope = keys.source.get("rope_parameters") or {}
    share = keys.real("partial_rotary_factor", rope.get("partial_rotary_factor", 0.5))
    turning = round(keys.number("head_dim", 128) * share)
    if share > 1 or turning % 2:
        raise keys.refuse(f"partial_rotary_factor is {share}", "but must leave pairs to turn")
    bias = keys.flag("attention_bias", True)
    return read_llama(keys, head_dim=128, rope_dim=turning, qkv_bias=bias, **axes)


def write(config: DecoderConfig) -> dict[str, Any]:
    share = config.rope_dim / config.head_dim
    return write_llama(config) | {
        "partial_rotary_factor": share,
        "attention_bias": config.qkv_bias,
    }


read_gguf = functools.partial(read_gguf_llama, partial=True)


def write_gguf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    need_full_heads(config)
    return write_gguf_llama(config, source)


FAMILY = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    gguf="chatglm",
    names=NAMES,
    read=read,
    write=write,
    read_gguf=read_gguf,
    write_gguf=write_gguf,
    folds=FOLDS,
)
