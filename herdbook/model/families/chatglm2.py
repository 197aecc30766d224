"""ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4 under Zhipu's own names: RMS norms, few key/value heads,
and a rotation of pairs side by side in the first half of each head; the second half does not turn.

Shares its model_type with ChatGLM-6B, which has neither `multi_query_attention` nor a `rmsnorm`.
query_key_value is [Q; K; V] with biases, dense_h_to_4h is [gate; up]. GGUF ("chatglm") packs alike.

`rope_ratio` multiplies the base of 10,000 (ChatGLM3-32k, GLM-4), but in ChatGLM2-32k, which came first,
it divides the positions. No key tells which, only the name that the file gives itself.
Source: modeling_chatglm.py of THUDM/chatglm2-6b, chatglm2-6b-32k and chatglm3-6b-32k, 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from herdbook.model.config import DecoderConfig, RopeScaling
from herdbook.model.family import Family
from herdbook.model.folds import QKV, Fold, qkv_rotating
from herdbook.model.gguf_keys import need_full_heads, read_gguf_scaling, write_gguf_scaling
from herdbook.model.keys import Keys

LAYER = "transformer.encoder.layers.{n}"
QKV_HF, QKV_GGUF = f"{LAYER}.self_attention.query_key_value", "blk.{n}.attn_qkv"
UP_HF, UP_GGUF = f"{LAYER}.mlp.dense_h_to_4h", "blk.{n}.ffn_up"
NAMES = {
    "embed": ("transformer.embedding.word_embeddings", "token_embd"),
    "blocks.{n}.attention_norm": (f"{LAYER}.input_layernorm", "blk.{n}.attn_norm"),
    "blocks.{n}.attention.q": (QKV_HF, QKV_GGUF),
    "blocks.{n}.attention.k": (QKV_HF, QKV_GGUF),
    "blocks.{n}.attention.v": (QKV_HF, QKV_GGUF),
    "blocks.{n}.attention.o": (f"{LAYER}.self_attention.dense", "blk.{n}.attn_output"),
    "blocks.{n}.mlp_norm": (f"{LAYER}.post_attention_layernorm", "blk.{n}.ffn_norm"),
    "blocks.{n}.mlp.gate": (UP_HF, UP_GGUF),
    "blocks.{n}.mlp.up": (UP_HF, UP_GGUF),
    "blocks.{n}.mlp.down": (f"{LAYER}.mlp.dense_4h_to_h", "blk.{n}.ffn_down"),
    "norm": ("transformer.encoder.final_layernorm", "output_norm"),
    "head": ("transformer.output_layer", "output"),
}
ROTATING = Fold(QKV, qkv_rotating(None))
GATE_UP = Fold(("blocks.{n}.mlp.gate", "blocks.{n}.mlp.up"))
#: what the code reads and all published models agree on
SAME: dict[str, Any] = {
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "original_rope": True,
}
#: of training, or of how the same result is computed
WITHOUT_EFFECT = {
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "classifier_dropout",
    "vocab_size",
}
ROPE_BASE = 10_000.0
INTERPOLATED = "THUDM/chatglm2-6b-32k"


def read(keys: Keys) -> DecoderConfig:
    for key, value in SAME.items():
        if keys.take(key, value) != value:
            raise keys.refuse(f"{key} is {keys.take(key)!r}", f"but must be {value!r} here")
    keys.taken |= WITHOUT_EFFECT
    heads, hidden = keys.number("num_attention_heads"), keys.number("hidden_size")
    kv_heads = keys.number("multi_query_group_num", 1)
    head_dim = keys.number("kv_channels", hidden // heads)
    if heads % kv_heads or head_dim % 4:
        raise keys.refuse(
            f"{heads} heads of {head_dim}", f"do not divide among {kv_heads} and turn in half"
        )
    ratio = keys.real("rope_ratio", 1.0)
    divides = ratio != 1.0 and "chatglm2" in str(keys.take("_name_or_path")).lower()
    return DecoderConfig(
        vocab=keys.number("padded_vocab_size"),
        hidden=hidden,
        layers=keys.number("num_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=keys.number("ffn_hidden_size"),
        max_pos=keys.number("seq_length", 2048),
        eps=keys.real("layernorm_epsilon", 1e-5),
        rope_dim=head_dim // 2,
        rope_base=ROPE_BASE if divides else ROPE_BASE * ratio,
        rope_scaling=RopeScaling("linear", ratio) if divides else None,
        qkv_bias=True,
        tied=keys.flag("tie_word_embeddings"),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    ratio: dict[str, Any] = {"rope_ratio": config.rope_base / ROPE_BASE}
    if config.rope_scaling is not None:
        ratio = {"rope_ratio": config.rope_scaling.factor, "_name_or_path": INTERPOLATED}
    return (
        SAME
        | ratio
        | {
            "padded_vocab_size": config.vocab,
            "hidden_size": config.hidden,
            "ffn_hidden_size": config.ffn,
            "num_layers": config.layers,
            "num_attention_heads": config.heads,
            "multi_query_group_num": config.kv_heads,
            "kv_channels": config.head_dim,
            "seq_length": config.max_pos,
            "layernorm_epsilon": config.eps,
            "tie_word_embeddings": config.tied,
        }
    )


GGUF_KEYS = {
    "seq_length": "context_length",
    "hidden_size": "embedding_length",
    "num_layers": "block_count",
    "ffn_hidden_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "multi_query_group_num": "attention.head_count_kv",
    "layernorm_epsilon": "attention.layer_norm_rms_epsilon",
    "kv_channels": "attention.key_length",
}


def read_gguf(keys: Keys, source: dict[str, Any], has: Callable[[str], bool]) -> None:
    source["padded_vocab_size"] = source.pop("vocab_size")
    source["rope_ratio"] = keys.real("rope.freq_base", ROPE_BASE) / ROPE_BASE
    width = source.get("kv_channels") or source["hidden_size"] // source["num_attention_heads"]
    turning = keys.take("rope.dimension_count", width // 2)
    if turning != width // 2 or keys.take("attention.value_length", width) != width:
        raise keys.refuse(f"{turning} dimensions of a head turn", f"but must be half of {width}")
    read_gguf_scaling(keys, source)
    if scaling := source.pop("rope_scaling", None):
        if scaling["rope_type"] != "linear" or source["rope_ratio"] != 1.0:
            raise keys.refuse(
                f"the rotary scaling is {scaling}", "but the family knows only linear"
            )
        source |= {"rope_ratio": scaling["factor"], "_name_or_path": INTERPOLATED}


def write_gguf(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    need_full_heads(config)
    return {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rope_dim,
        "rope.freq_base": config.rope_base,
        **write_gguf_scaling(config),
    }


FAMILY = Family(
    model_type="chatglm",
    mine=lambda source: "multi_query_group_num" in source or source.get("rmsnorm") is True,
    architecture="ChatGLMForConditionalGeneration",
    gguf="chatglm",
    names=NAMES,
    read=read,
    write=write,
    gguf_keys=GGUF_KEYS,
    read_gguf=read_gguf,
    write_gguf=write_gguf,
    folds={QKV_HF: ROTATING, QKV_GGUF: ROTATING, UP_HF: GATE_UP, UP_GGUF: GATE_UP},
)
