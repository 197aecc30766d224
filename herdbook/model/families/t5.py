"""T5 v1.0 and v1.1, Flan-T5, UL2, ChatYuan: `herdbook/model/t5.py`.

v1.1 gates its MLP, has a head of its own and does not scale what goes into it. Whether there is such a
head, the tensors say: transformers 5 writes `tie_word_embeddings: true` for all of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family, Names
from herdbook.model.keys import Keys
from herdbook.model.own_configs import T5Config

#: feed_forward_proj → whether it is gated, and our activation
MLPS = {
    "relu": (False, "relu"),
    "gated-gelu": (True, "gelu_tanh"),
    "gated-silu": (True, "silu"),
    "gelu": (False, "gelu"),
    "gelu_new": (False, "gelu_tanh"),
    "silu": (False, "silu"),
    "gated-relu": (True, "relu"),
}
#: positions are relative and without an end; so many tokens, prompt and reply, are taken
CONTEXT = 2048

NAMES: Names = {
    "embed": ("shared", ""),
    "encoder_norm": ("encoder.final_layer_norm", ""),
    "encoder_bias": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", ""),
    "decoder_bias": ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", ""),
    "norm": ("decoder.final_layer_norm", ""),
    "head": ("lm_head", ""),
}


@lru_cache(maxsize=8)
def rows(config: T5Config, mlp: str) -> Names:
    """The blocks' rows: ours are one list, the source's are two. mlp: what it calls them."""
    found: dict[str, str] = {}
    for layer in range(config.layers):
        decodes = layer >= config.encoder_layers
        stack, number = (
            ("decoder", layer - config.encoder_layers) if decodes else ("encoder", layer)
        )
        block, last = f"{stack}.block.{number}.layer", 2 if decodes else 1
        found[f"blocks.{layer}.attention_norm"] = f"{block}.0.layer_norm"
        found[f"blocks.{layer}.mlp_norm"] = f"{block}.{last}.layer_norm"
        for one in "qkvo":
            found[f"blocks.{layer}.attention.{one}"] = f"{block}.0.SelfAttention.{one}"
        if decodes:
            found[f"blocks.{layer}.cross_norm"] = f"{block}.1.layer_norm"
            for one in "qkvo":
                found[f"blocks.{layer}.cross.{one}"] = f"{block}.1.EncDecAttention.{one}"
        inner, room = f"blocks.{layer}.mlp", f"{block}.{last}.{mlp}"
        places = [(inner, room)]
        if layer in config.sparse:
            places = [
                (f"{inner}.experts.{e}", f"{room}.experts.expert_{e}")
                for e in range(config.experts)
            ]
            found[f"{inner}.router"] = f"{room}.router.classifier"
        for ours, theirs in places:
            found[f"{ours}.gate"] = f"{theirs}.wi_0"
            found[f"{ours}.up"] = f"{theirs}.wi_1" if config.gated else f"{theirs}.wi"
            found[f"{ours}.down"] = f"{theirs}.wo"
    return {ours: (theirs, "") for ours, theirs in found.items()}


def renamed(config: DecoderConfig) -> Names:
    assert isinstance(config, T5Config)
    return rows(config, "DenseReluDense")


def sizes(keys: Keys) -> dict[str, Any]:
    """The axes that all T5s have."""
    encoder_layers = keys.number("num_layers")
    buckets = keys.number("relative_attention_num_buckets", 32)
    far = keys.number("relative_attention_max_distance", 128)
    if buckets % 4 or far <= buckets // 2:
        raise keys.refuse(f"{buckets} buckets for distances up to {far}", "cannot be told apart")
    heads = keys.number("num_heads")
    keys.taken |= {"n_positions", "is_encoder_decoder", "output_past", "tokenizer_class"}
    keys.taken |= {"initializer_factor", "gradient_checkpointing", "max_length"}
    if keys.flag("is_decoder"):
        raise keys.refuse("is_decoder is true", "but a T5 has an encoder and a decoder")
    return {
        "vocab": keys.number("vocab_size"),
        "hidden": keys.number("d_model"),
        "layers": encoder_layers + keys.number("num_decoder_layers", encoder_layers),
        "encoder_layers": encoder_layers,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": keys.number("d_kv"),
        "ffn": keys.number("d_ff"),
        "max_pos": CONTEXT,
        "eps": keys.real("layer_norm_epsilon", 1e-6),
        "position": "none",
        "buckets": buckets,
        "far": far,
        "start": keys.take("decoder_start_token_id", keys.take("pad_token_id", 0)),
        "end": keys.take("eos_token_id", 1),
    }


def write_sizes(c: T5Config) -> dict[str, Any]:
    """The inverse of `sizes`."""
    return {
        "vocab_size": c.vocab,
        "d_model": c.hidden,
        "num_layers": c.encoder_layers,
        "num_decoder_layers": c.layers - c.encoder_layers,
        "num_heads": c.heads,
        "d_kv": c.head_dim,
        "d_ff": c.ffn,
        "layer_norm_epsilon": c.eps,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.far,
        "decoder_start_token_id": c.start,
        "eos_token_id": c.end,
        "is_encoder_decoder": True,
        "tie_word_embeddings": c.tied,
    }


def read(keys: Keys) -> DecoderConfig:
    tied = keys.flag("tie_word_embeddings", True)
    gated, activation = keys.choice("feed_forward_proj", MLPS, "relu")
    keys.taken |= {"dense_act_fn", "is_gated_act"}  # said by feed_forward_proj
    return T5Config(
        **sizes(keys),
        gated=gated,
        activation=activation,
        tied=tied,
        output_scale=keys.flag("scale_decoder_outputs", tied),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    assert isinstance(config, T5Config)
    both = (config.gated, config.activation)
    return write_sizes(config) | {
        "feed_forward_proj": next(one for one, said in MLPS.items() if said == both),
        "scale_decoder_outputs": config.output_scale,
    }


FAMILY = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    gguf="",
    names=NAMES,
    read=read,
    write=write,
    renamed=renamed,
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ties_by_tensors=True,
)
