"""BLOOM and BLOOMZ, and their Chinese children (BELLE-7B, Firefly): ALiBi, a norm on the embedding.

Scao et al., 2022 (arXiv:2211.05100). q, k and v lie head by head in one matrix. max_pos is the
context it was trained for (seq_length, where the source says so): ALiBi itself has no end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family
from herdbook.model.folds import QKV, Fold, qkv_by_head
from herdbook.model.keys import Keys

LAYER = "transformer.h.{n}"
PACKED = (f"{LAYER}.self_attention.query_key_value", "blk.{n}.attn_qkv")
NAMES = {
    "embed": ("transformer.word_embeddings", "token_embd"),
    "embed_norm": ("transformer.word_embeddings_layernorm", "token_embd_norm"),
    "blocks.{n}.attention_norm": (f"{LAYER}.input_layernorm", "blk.{n}.attn_norm"),
    **{name: PACKED for name in QKV},
    "blocks.{n}.attention.o": (f"{LAYER}.self_attention.dense", "blk.{n}.attn_output"),
    "blocks.{n}.mlp_norm": (f"{LAYER}.post_attention_layernorm", "blk.{n}.ffn_norm"),
    "blocks.{n}.mlp.up": (f"{LAYER}.mlp.dense_h_to_4h", "blk.{n}.ffn_up"),
    "blocks.{n}.mlp.down": (f"{LAYER}.mlp.dense_4h_to_h", "blk.{n}.ffn_down"),
    "norm": ("transformer.ln_f", "output_norm"),
    "head": ("lm_head", "output"),
}

GGUF_KEYS = {
    "seq_length": "context_length",
    "hidden_size": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "vocab_size": "vocab_size",
}

#: how Megatron computed it, not what
FUSIONS = ("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion")


def read(keys: Keys) -> DecoderConfig:
    keys.taken |= {*FUSIONS, "skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "slow_but_exact"}
    hidden = keys.number(keys.either("hidden_size", "n_embed"))
    heads = keys.number(keys.either("n_head", "num_attention_heads"))
    keys.only("n_inner", 4 * hidden)
    return DecoderConfig(
        vocab=keys.number("vocab_size"),
        hidden=hidden,
        layers=keys.number(keys.either("n_layer", "num_hidden_layers")),
        heads=heads,
        kv_heads=heads,
        head_dim=keys.head_dim(hidden, heads),
        ffn=4 * hidden,
        max_pos=keys.number("seq_length", 2048),
        norm="ln",
        eps=keys.real("layer_norm_epsilon", 1e-5),
        position="alibi",
        qkv_bias=True,
        out_bias=True,
        activation="gelu_tanh",
        gated=False,
        mlp_bias=True,
        embed_norm=True,
        tied=keys.flag("tie_word_embeddings", True),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    c = config
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "n_layer": c.layers,
        "n_head": c.heads,
        "seq_length": c.max_pos,
        "layer_norm_epsilon": c.eps,
        "tie_word_embeddings": c.tied,
    }


def read_gguf(keys: Keys, source: dict[str, Any], has: Callable[[str], bool]) -> None:
    keys.take("attention.head_count_kv")
    source["n_inner"] = keys.number("feed_forward_length")


def write_gguf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    return {"feed_forward_length": config.ffn, "attention.head_count_kv": config.heads}


FAMILY = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    gguf="bloom",
    names=NAMES,
    read=read,
    write=write,
    gguf_keys=GGUF_KEYS,
    read_gguf=read_gguf,
    write_gguf=write_gguf,
    folds={PACKED[0]: Fold(QKV, qkv_by_head), PACKED[1]: Fold(QKV)},
)
