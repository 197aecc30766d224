"""ChatGLM-6B: a prefix model, with two places a token and the norms' outputs as residuals (DeepNorm).

Du et al., 2022 (arXiv:2103.10360); https://github.com/THUDM/ChatGLM-6B. α is √56 whatever the number of
layers: its blocks take their default of 28. ChatGLM2 and 3 share the model_type, not these keys.
The vocabulary of the first checkpoints had 20,000 image tokens in front: all marks lie so much higher.
"""

from __future__ import annotations

import math
from typing import Any

from herdbook.model.config import DecoderConfig, PrefixMarks
from herdbook.model.family import Family
from herdbook.model.folds import QKV, Fold, qkv_by_head
from herdbook.model.keys import Keys

LAYER = "transformer.layers.{n}"
PACKED = f"{LAYER}.attention.query_key_value"
NAMES = {
    "embed": ("transformer.word_embeddings", ""),
    "blocks.{n}.attention_norm": (f"{LAYER}.input_layernorm", ""),
    **{name: (PACKED, "") for name in QKV},
    "blocks.{n}.attention.o": (f"{LAYER}.attention.dense", ""),
    "blocks.{n}.mlp_norm": (f"{LAYER}.post_attention_layernorm", ""),
    "blocks.{n}.mlp.up": (f"{LAYER}.mlp.dense_h_to_4h", ""),
    "blocks.{n}.mlp.down": (f"{LAYER}.mlp.dense_4h_to_h", ""),
    "norm": ("transformer.final_layernorm", ""),
    "head": ("lm_head", ""),
}


def read_glm(keys: Keys, start: int, **axes: Any) -> DecoderConfig:
    """The keys that ChatGLM-6B and GLM-130B share. start: <sop>, where the source does not say."""
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    start = keys.number("bos_token_id", start)
    marks = PrefixMarks(
        start=start,
        whole=keys.number("gmask_token_id", start - 3),
        blank=keys.number("mask_token_id", start - 4),
    )
    return DecoderConfig(
        vocab=keys.number("vocab_size"),
        hidden=hidden,
        layers=keys.number("num_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=keys.head_dim(hidden, heads),
        ffn=keys.number("inner_hidden_size", 4 * hidden),
        max_pos=keys.number("max_sequence_length", 2048),
        norm="ln",
        eps=keys.real("layernorm_epsilon", 1e-5),
        norm_place="deepnorm",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=keys.flag("tie_word_embeddings", True),
        prefix=marks,
        **axes,
    )


def write_glm(config: DecoderConfig) -> dict[str, Any]:
    c = config
    assert c.prefix is not None
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "num_layers": c.layers,
        "num_attention_heads": c.heads,
        "inner_hidden_size": c.ffn,
        "max_sequence_length": c.max_pos,
        "layernorm_epsilon": c.eps,
        "bos_token_id": c.prefix.start,
        "gmask_token_id": c.prefix.whole,
        "mask_token_id": c.prefix.blank,
        "tie_word_embeddings": c.tied,
    }


def read(keys: Keys) -> DecoderConfig:
    keys.only("quantization_bit", 0)  # checkpoints of its own int4 and int8
    keys.only("pre_seq_len", None)  # P-tuning
    vocab = keys.number("vocab_size")
    position = "rope2d" if keys.flag("position_encoding_2d", True) else "rope"
    return read_glm(
        keys,
        start=150_004 if vocab > 150_000 else 130_004,
        residual_alpha=math.sqrt(2 * 28),
        position=position,
        activation="gelu_tanh",
        gated=False,
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    return write_glm(config) | {"position_encoding_2d": config.position == "rope2d"}


FAMILY = Family(
    model_type="chatglm",
    mine=lambda source: "inner_hidden_size" in source,
    architecture="ChatGLMModel",
    gguf="",
    names=NAMES,
    read=read,
    write=write,
    folds={PACKED: Fold(QKV, qkv_by_head)},
)
