"""GPT-NeoX 20B and its children: Pythia, Dolly 2, RedPajama-INCITE, OpenAssistant's first.

Black et al., 2022 (arXiv:2204.06745). A quarter of each head turns; attention and MLP stand beside
one another, each with its own norm (RedPajama-INCITE: one after the other).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family
from herdbook.model.folds import QKV, Fold, qkv_by_head
from herdbook.model.gguf_keys import need_activation
from herdbook.model.keys import ACTIVATIONS, Keys, activation_name, read_rope, write_rope_scaling

LAYER = "gpt_neox.layers.{n}"
PACKED = (f"{LAYER}.attention.query_key_value", "blk.{n}.attn_qkv")
NAMES = {
    "embed": ("gpt_neox.embed_in", "token_embd"),
    "blocks.{n}.attention_norm": (f"{LAYER}.input_layernorm", "blk.{n}.attn_norm"),
    **{name: PACKED for name in QKV},
    "blocks.{n}.attention.o": (f"{LAYER}.attention.dense", "blk.{n}.attn_output"),
    "blocks.{n}.mlp_norm": (f"{LAYER}.post_attention_layernorm", "blk.{n}.ffn_norm"),
    "blocks.{n}.mlp.up": (f"{LAYER}.mlp.dense_h_to_4h", "blk.{n}.ffn_up"),
    "blocks.{n}.mlp.down": (f"{LAYER}.mlp.dense_4h_to_h", "blk.{n}.ffn_down"),
    "norm": ("gpt_neox.final_layer_norm", "output_norm"),
    "head": ("embed_out", "output"),
}

GGUF_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "rotary_emb_base": "rope.freq_base",
    "use_parallel_residual": "use_parallel_residual",
    "vocab_size": "vocab_size",
}


def read(keys: Keys) -> DecoderConfig:
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    head_dim = keys.head_dim(hidden, heads)
    max_pos = keys.number("max_position_embeddings", 2048)
    # both ways of writing the rotation, under the names that read_rope knows
    rope = dict(keys.take("rope_parameters") or keys.take("rope_scaling") or {})
    share = rope.pop("partial_rotary_factor", keys.take("rotary_pct", 0.25))
    rope.setdefault("rope_theta", keys.real("rotary_emb_base", 10_000.0))
    base, scaling = read_rope(Keys({"rope_parameters": rope}, keys.where), max_pos)
    keys.taken.add("rope_scaling")
    turning = int(head_dim * share)
    if not 0 < turning <= head_dim or turning % 2:
        raise keys.refuse(f"rotary_pct is {share}", f"but {turning} dimensions make no pairs")
    bias = keys.flag("attention_bias", True)
    return DecoderConfig(
        vocab=keys.number("vocab_size"),
        hidden=hidden,
        layers=keys.number("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        ffn=keys.number("intermediate_size"),
        max_pos=max_pos,
        norm="ln",
        eps=keys.real("layer_norm_eps", 1e-5),
        residual="parallel2" if keys.flag("use_parallel_residual", True) else "sequential",
        rope_dim=turning,
        rope_base=base,
        rope_scaling=scaling,
        qkv_bias=bias,
        out_bias=bias,
        activation=keys.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated=False,
        mlp_bias=True,
        tied=keys.flag("tie_word_embeddings", False),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    c = config
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.ffn,
        "max_position_embeddings": c.max_pos,
        "layer_norm_eps": c.eps,
        "use_parallel_residual": c.residual == "parallel2",
        "rotary_pct": c.rope_dim / c.head_dim,
        "rotary_emb_base": c.rope_base,
        "rope_scaling": write_rope_scaling(c),
        "attention_bias": c.qkv_bias,
        "hidden_act": activation_name(c),
        "tie_word_embeddings": c.tied,
    }


def read_gguf(keys: Keys, source: dict[str, Any], has: Callable[[str], bool]) -> None:
    keys.take("attention.head_count_kv")
    head_dim = source["hidden_size"] // source["num_attention_heads"]
    source["rotary_pct"] = keys.number("rope.dimension_count", head_dim) / head_dim


def write_gguf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    need_activation(config, "gelu")
    return {"rope.dimension_count": config.rope_dim}


FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    gguf="gptneox",
    names=NAMES,
    read=read,
    write=write,
    gguf_keys=GGUF_KEYS,
    read_gguf=read_gguf,
    write_gguf=write_gguf,
    folds={PACKED[0]: Fold(QKV, qkv_by_head), PACKED[1]: Fold(QKV)},
)
