"""Falcon: 7B (one norm, one key/value head), 40B and 180B (two norms, groups), RW (ALiBi, in turn).

Almazrouei et al., 2023 (arXiv:2311.16867). q, k and v lie group by group in one matrix. Its first
checkpoints call themselves RefinedWeb and RefinedWebModel. llama.cpp knows the rotating ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from herdbook.errors import FamilyError
from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family, Names
from herdbook.model.folds import QKV, Fold, qkv_by_group
from herdbook.model.gguf_keys import need_activation
from herdbook.model.keys import ACTIVATIONS, Keys, activation_name, read_rope, write_rope_scaling

LAYER = "transformer.h.{n}"
PACKED = (f"{LAYER}.self_attention.query_key_value", "blk.{n}.attn_qkv")
NAMES = {
    "embed": ("transformer.word_embeddings", "token_embd"),
    "blocks.{n}.attention_norm": (f"{LAYER}.input_layernorm", "blk.{n}.attn_norm"),
    **{name: PACKED for name in QKV},
    "blocks.{n}.attention.o": (f"{LAYER}.self_attention.dense", "blk.{n}.attn_output"),
    "blocks.{n}.mlp_norm": (f"{LAYER}.post_attention_layernorm", "blk.{n}.attn_norm_2"),
    "blocks.{n}.mlp.up": (f"{LAYER}.mlp.dense_h_to_4h", "blk.{n}.ffn_up"),
    "blocks.{n}.mlp.down": (f"{LAYER}.mlp.dense_4h_to_h", "blk.{n}.ffn_down"),
    "norm": ("transformer.ln_f", "output_norm"),
    "head": ("lm_head", "output"),
}
TWO_NORMS = {
    "blocks.{n}.attention_norm": (f"{LAYER}.ln_attn", "blk.{n}.attn_norm_2"),
    "blocks.{n}.mlp_norm": (f"{LAYER}.ln_mlp", "blk.{n}.attn_norm"),
}

GGUF_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "ffn_hidden_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}


def renamed(config: DecoderConfig) -> Names:
    return TWO_NORMS if config.residual == "parallel2" else {}


def read(keys: Keys) -> DecoderConfig:
    hidden = keys.number(keys.either("hidden_size", "n_embed"))
    heads = keys.number(keys.either("num_attention_heads", "n_head"))
    kv_heads = keys.number(keys.either("num_kv_heads", "n_head_kv"), heads)
    # the first 40B has no key for its architecture, but for its groups a name of their own
    grouped = keys.flag("new_decoder_architecture", "n_head_kv" in keys.source)
    bias = keys.flag("bias")
    if keys.flag("multi_query", True) and not grouped:
        kv_heads = 1
    if heads % kv_heads:
        raise keys.refuse(f"{heads} heads", f"do not divide among {kv_heads} key/value heads")
    parallel = keys.flag("parallel_attn", True)
    norms = keys.number("num_ln_in_parallel_attn", 2 if grouped else 1)
    if (grouped and not parallel) or (norms == 2 and not grouped) or norms > 2:
        raise keys.refuse(
            f"new_decoder_architecture {grouped}, parallel_attn {parallel}, {norms} norms",
            "do not go together",
        )
    alibi = keys.flag("alibi")
    max_pos = keys.number("max_position_embeddings", 2048)
    base, scaling = read_rope(keys, max_pos)
    return DecoderConfig(
        vocab=keys.number("vocab_size"),
        hidden=hidden,
        layers=keys.number(keys.either("num_hidden_layers", "n_layer")),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys.head_dim(hidden, heads),
        ffn=keys.number("ffn_hidden_size", 4 * hidden),
        max_pos=max_pos,
        norm="ln",
        eps=keys.real("layer_norm_epsilon", 1e-5),
        residual="sequential" if not parallel else "parallel2" if norms == 2 else "parallel1",
        position="alibi" if alibi else "rope",
        alibi_rounded=alibi,
        rope_base=base,
        rope_scaling=scaling,
        qkv_bias=bias,
        out_bias=bias,
        activation=keys.choice("activation", ACTIVATIONS, "gelu"),
        gated=False,
        mlp_bias=bias,
        tied=keys.flag("tie_word_embeddings", True),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    c = config
    grouped = c.residual == "parallel2" or 1 < c.kv_heads < c.heads
    parallel = c.residual != "sequential"
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_kv_heads": c.kv_heads,
        "multi_query": c.kv_heads == 1,
        "new_decoder_architecture": grouped,
        "parallel_attn": parallel,
        "num_ln_in_parallel_attn": (2 if c.residual == "parallel2" else 1) if grouped else None,
        "ffn_hidden_size": c.ffn,
        "max_position_embeddings": c.max_pos,
        "layer_norm_epsilon": c.eps,
        "alibi": c.position == "alibi",
        "rope_theta": c.rope_base,
        "rope_scaling": write_rope_scaling(c),
        "bias": c.qkv_bias,
        "activation": activation_name(c),
        "tie_word_embeddings": c.tied,
    }


def read_gguf(keys: Keys, source: dict[str, Any], has: Callable[[str], bool]) -> None:
    keys.taken |= {"tensor_data_layout", "rope.dimension_count"}
    two = has("blocks.0.mlp_norm.weight")
    source["multi_query"] = source.get("num_kv_heads") == 1
    source["new_decoder_architecture"] = two or not source["multi_query"]
    source["num_ln_in_parallel_attn"] = 2 if two else 1


def write_gguf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    if config.position == "alibi" or config.residual == "sequential" or config.qkv_bias:
        raise FamilyError(
            "a Falcon with ALiBi, biases, or attention and MLP in turn",
            rule="cannot be written as GGUF: llama.cpp does not know it",
            next="export it as a Hugging Face folder (--to hf)",
        )
    need_activation(config, "gelu")
    return {"tensor_data_layout": "jploski"}


FAMILY = Family(
    model_type="falcon",
    also=("RefinedWeb", "RefinedWebModel"),
    architecture="FalconForCausalLM",
    gguf="falcon",
    names=NAMES,
    renamed=renamed,
    read=read,
    write=write,
    gguf_keys=GGUF_KEYS,
    read_gguf=read_gguf,
    write_gguf=write_gguf,
    folds={PACKED[0]: Fold(QKV, qkv_by_group), PACKED[1]: Fold(QKV)},
)
