"""Baichuan 1 and 2, 7B and 13B: LLaMA's shape with q, k and v in one matrix, W_pack = [Q; K; V].

The 7B rotate; the 13B have no rotation but ALiBi. Their published configurations tell them apart by
size, and else by a key: only the 7B's code reads `max_position_embeddings`, the 13B's has
`model_max_length` alone. Baichuan 2 (its configuration has `z_loss_weight`) normalises the rows of
its head: logits = h · normalize(W)ᵀ.

GGUF: split into q, k and v; nothing but the number of layers tells the 7B (32) from the 13B (40).
llama.cpp does not norm a head, so it is written normed; a file of Baichuan 2 (125,696 tokens) is
normed when read, which changes nothing where its maker did so already.
Source: baichuan-inc's modeling_baichuan.py, 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from herdbook.errors import FamilyError
from herdbook.model.config import DecoderConfig
from herdbook.model.family import GGUF_ROTATING, LLAMA_NAMES, Family
from herdbook.model.folds import QKV, Fold
from herdbook.model.gguf_keys import GGUF_KEYS, read_gguf_llama, write_gguf_llama
from herdbook.model.keys import Keys, read_llama, write_llama

PACKED = "model.layers.{n}.self_attn.W_pack"
NAMES = LLAMA_NAMES | {
    f"blocks.{{n}}.attention.{one}": (PACKED, f"blk.{{n}}.attn_{one}") for one in "qkv"
}
HIDDEN_7B, HIDDEN_13B, LAYERS_7B, LAYERS_13B, VOCAB_2 = 4096, 5120, 32, 40, 125_696


def read(keys: Keys) -> DecoderConfig:
    hidden = keys.number("hidden_size")
    turning = keys.take("max_position_embeddings") is not None
    longest = keys.number("model_max_length", 4096)
    second = "z_loss_weight" in keys.source or keys.number("vocab_size") == VOCAB_2
    keys.taken |= {"z_loss_weight", "tokenizer_class"}
    config = read_llama(keys, head_norm=second)
    if hidden == HIDDEN_7B or (turning and hidden != HIDDEN_13B):
        return config
    return dataclasses.replace(config, position="alibi", max_pos=longest)


def write(config: DecoderConfig) -> dict[str, Any]:
    """Only the keys of the published configurations: no groups, no other rotation."""
    known = write_llama(config)
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling"):
        known.pop(key)
    if config.position == "alibi":
        known["model_max_length"] = known.pop("max_position_embeddings")
    return known | ({"z_loss_weight": 0} if config.head_norm else {})


def read_gguf(keys: Keys, source: dict[str, Any], has: Callable[[str], bool]) -> None:
    layers = source.get("num_hidden_layers")
    if layers not in (LAYERS_7B, LAYERS_13B):
        raise FamilyError(
            f"{keys.where}: a Baichuan of {layers} layers",
            rule=f"cannot be written as GGUF: it means rotation by {LAYERS_7B} layers and ALiBi by "
            f"{LAYERS_13B}",
            next="export it as a Hugging Face folder (--to hf)",
        )
    if layers == LAYERS_13B:
        source["model_max_length"] = source.pop("max_position_embeddings", 4096)
    read_gguf_llama(keys, source, has)


def write_gguf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    return write_gguf_llama(config, source) | {
        "context_length": config.max_pos,
        "attention.head_count_kv": config.kv_heads,
        "rope.freq_base": config.rope_base,
    }


FAMILY = Family(
    model_type="baichuan",
    architecture="BaichuanForCausalLM",
    gguf="baichuan",
    names=NAMES,
    read=read,
    write=write,
    gguf_keys=GGUF_KEYS,
    read_gguf=read_gguf,
    write_gguf=write_gguf,
    folds=GGUF_ROTATING | {PACKED: Fold(QKV)},
)
