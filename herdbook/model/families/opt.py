"""OPT: learned positions from row 2 on, ReLU; 350M norms after each part and has a narrow embedding.

Zhang et al., 2022 (arXiv:2205.01068). llama.cpp does not know the family.
"""

from __future__ import annotations

from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family
from herdbook.model.keys import ACTIVATIONS, Keys, activation_name

LAYER = "model.decoder.layers.{n}"
NAMES = {
    "embed": ("model.decoder.embed_tokens", ""),
    "places": ("model.decoder.embed_positions", ""),
    "project_in": ("model.decoder.project_in", ""),
    "project_out": ("model.decoder.project_out", ""),
    "blocks.{n}.attention_norm": (f"{LAYER}.self_attn_layer_norm", ""),
    "blocks.{n}.attention.q": (f"{LAYER}.self_attn.q_proj", ""),
    "blocks.{n}.attention.k": (f"{LAYER}.self_attn.k_proj", ""),
    "blocks.{n}.attention.v": (f"{LAYER}.self_attn.v_proj", ""),
    "blocks.{n}.attention.o": (f"{LAYER}.self_attn.out_proj", ""),
    "blocks.{n}.mlp_norm": (f"{LAYER}.final_layer_norm", ""),
    "blocks.{n}.mlp.up": (f"{LAYER}.fc1", ""),
    "blocks.{n}.mlp.down": (f"{LAYER}.fc2", ""),
    "norm": ("model.decoder.final_layer_norm", ""),
    "head": ("lm_head", ""),
}


def read(keys: Keys) -> DecoderConfig:
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    keys.only("_remove_final_layer_norm", False)
    keys.only("layer_norm_elementwise_affine", True)
    width, bias = keys.number("word_embed_proj_dim", hidden), keys.flag("enable_bias", True)
    return DecoderConfig(
        vocab=keys.number("vocab_size"),
        hidden=hidden,
        layers=keys.number("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=keys.head_dim(hidden, heads),
        ffn=keys.number("ffn_dim"),
        max_pos=keys.number("max_position_embeddings", 2048),
        norm="ln",
        norm_place="pre" if keys.flag("do_layer_norm_before", True) else "post",
        position="learned",
        position_offset=2,
        qkv_bias=bias,
        out_bias=bias,
        activation=keys.choice("activation_function", ACTIVATIONS, "relu"),
        gated=False,
        mlp_bias=bias,
        embed_dim=width if width != hidden else 0,
        tied=keys.flag("tie_word_embeddings", True),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    c = config
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "ffn_dim": c.ffn,
        "max_position_embeddings": c.max_pos,
        "do_layer_norm_before": c.norm_place == "pre",
        "word_embed_proj_dim": c.embed_dim or c.hidden,
        "enable_bias": c.qkv_bias,
        "activation_function": activation_name(c),
        "tie_word_embeddings": c.tied,
    }


FAMILY = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    gguf="",
    names=NAMES,
    read=read,
    write=write,
)
