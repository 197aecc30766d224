"""GPT-2 and its children (DistilGPT-2, Cerebras-GPT, many Chinese GPT-2s): learned positions.

Radford et al., 2019. Hugging Face keeps its matrices as [in, out] (Conv1D), q, k and v in one.
GPT-J and CodeGen share its keys (n_embd, n_head …).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family
from herdbook.model.folds import QKV, Fold
from herdbook.model.gguf_keys import need_activation
from herdbook.model.keys import ACTIVATIONS, Keys, activation_name

NAMES = {
    "embed": ("transformer.wte", "token_embd"),
    "places": ("transformer.wpe", "position_embd"),
    "blocks.{n}.attention_norm": ("transformer.h.{n}.ln_1", "blk.{n}.attn_norm"),
    "blocks.{n}.attention.q": ("transformer.h.{n}.attn.c_attn", "blk.{n}.attn_qkv"),
    "blocks.{n}.attention.k": ("transformer.h.{n}.attn.c_attn", "blk.{n}.attn_qkv"),
    "blocks.{n}.attention.v": ("transformer.h.{n}.attn.c_attn", "blk.{n}.attn_qkv"),
    "blocks.{n}.attention.o": ("transformer.h.{n}.attn.c_proj", "blk.{n}.attn_output"),
    "blocks.{n}.mlp_norm": ("transformer.h.{n}.ln_2", "blk.{n}.ffn_norm"),
    "blocks.{n}.mlp.up": ("transformer.h.{n}.mlp.c_fc", "blk.{n}.ffn_up"),
    "blocks.{n}.mlp.down": ("transformer.h.{n}.mlp.c_proj", "blk.{n}.ffn_down"),
    "norm": ("transformer.ln_f", "output_norm"),
    "head": ("lm_head", "output"),
}

FOLDS = {
    "transformer.h.{n}.attn.c_attn": Fold(QKV, transposed=True),
    "transformer.h.{n}.attn.c_proj": Fold(("blocks.{n}.attention.o",), transposed=True),
    "transformer.h.{n}.mlp.c_fc": Fold(("blocks.{n}.mlp.up",), transposed=True),
    "transformer.h.{n}.mlp.c_proj": Fold(("blocks.{n}.mlp.down",), transposed=True),
    "blk.{n}.attn_qkv": Fold(QKV),
}

GGUF_KEYS = {
    "n_positions": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "vocab_size": "vocab_size",
}


def read_gpt(keys: Keys, **axes: Any) -> DecoderConfig:
    """The keys that GPT-2, GPT-J and CodeGen share; `axes` are the family's own."""
    hidden, heads = keys.number("n_embd"), keys.number("n_head")
    keys.only("scale_attn_weights", True)
    return DecoderConfig(
        vocab=keys.number("vocab_size"),
        hidden=hidden,
        layers=keys.number("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=keys.head_dim(hidden, heads),
        ffn=keys.number("n_inner", 4 * hidden),
        max_pos=keys.number("n_positions", keys.number("n_ctx", 1024)),
        norm="ln",
        eps=keys.real("layer_norm_epsilon", 1e-5),
        activation=keys.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        mlp_bias=True,
        **axes,
    )


def read(keys: Keys) -> DecoderConfig:
    keys.take("reorder_and_upcast_attn")  # how Hugging Face rounds, not what is computed
    tied = keys.flag("tie_word_embeddings", True)
    return read_gpt(keys, position="learned", qkv_bias=True, out_bias=True, tied=tied)


def write(config: DecoderConfig) -> dict[str, Any]:
    c = config
    return {
        "vocab_size": c.vocab,
        "n_embd": c.hidden,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.ffn,
        "n_positions": c.max_pos,
        "layer_norm_epsilon": c.eps,
        "activation_function": activation_name(c),
        "tie_word_embeddings": c.tied,
    }


def read_gguf(keys: Keys, source: dict[str, Any], has: Callable[[str], bool]) -> None:
    keys.take("attention.head_count_kv")


def write_gguf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    need_activation(config, "gelu_tanh")
    return {}


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    gguf="gpt2",
    names=NAMES,
    read=read,
    write=write,
    gguf_keys=GGUF_KEYS,
    read_gguf=read_gguf,
    write_gguf=write_gguf,
    folds=FOLDS,
)
