"""Configurations as they were published (the keys that matter or might), and the sizes they stand for.

The numbers of parameters are those that the models are known by; a tied head counts once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from herdbook.errors import FamilyError
from herdbook.model.config import DecoderConfig, PrefixMarks
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_source

SUMMARY: dict[str, Any] = {
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
GPT: dict[str, Any] = SUMMARY | {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "use_cache": True,
}
GPTJ: dict[str, Any] = GPT | {
    "gradient_checkpointing": False,
    "n_inner": None,
    "n_positions": 2048,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.18.0.dev0",
}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
}
BLOOM: dict[str, Any] = {
    "model_type": "bloom",
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "n_inner": None,
    "offset_alibi": 100,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
    "unk_token_id": 0,
    "vocab_size": 250880,
}
FALCON: dict[str, Any] = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "parallel_attn": True,
    "vocab_size": 65024,
}
FALCON_40B = FALCON | {"hidden_size": 8192}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "dropout": 0.1,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "prefix": "</s>",
    "vocab_size": 50272,
}
CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "vocab_size": 130528,
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (
        GPT | {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
        | {"n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
    "gpt-j-6b": (
        GPTJ | {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_layer": 28}
        | {"rotary": True, "vocab_size": 50400},
        6_050_882_784,
    ),
    "moss-moon-003-sft": (
        GPTJ | {"model_type": "moss", "n_ctx": 2048, "n_embd": 6144, "n_head": 24, "n_layer": 34}
        | {"vocab_size": 107008},
        16_717_980_160,
    ),
    "pythia-70m": (
        NEOX | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
        | {"num_hidden_layers": 6, "vocab_size": 50304},
        70_426_624,
    ),
    "gpt-neox-20b": (
        NEOX | {"hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64}
        | {"num_hidden_layers": 44, "vocab_size": 50432, "hidden_act": "gelu_fast"}
        | {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
        20_554_567_680,
    ),
    "bloom-560m": (
        BLOOM | {"n_embed": 1024, "n_layer": 24, "num_attention_heads": 16},
        559_214_592,
    ),
    "bloomz-7b1": (
        BLOOM | {"n_embed": 4096, "n_layer": 30, "num_attention_heads": 32, "seq_length": 2048},
        7_069_016_064,
    ),
    "falcon-7b": (
        FALCON | {"model_type": "falcon", "hidden_size": 4544, "multi_query": True}
        | {"new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32},
        6_921_720_704,
    ),
    "falcon-40b": (
        FALCON_40B | {"model_type": "falcon", "new_decoder_architecture": True}
        | {"num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8},
        41_303_293_952,
    ),
    "falcon-40b, the first": (
        FALCON_40B | {"model_type": "RefinedWeb", "n_head": 128, "n_head_kv": 8, "n_layer": 60},
        41_303_293_952,
    ),
    "falcon-rw-1b": (
        FALCON | {"model_type": "falcon", "alibi": True, "bias": True, "multi_query": False}
        | {"parallel_attn": False, "hidden_size": 2048, "num_attention_heads": 32}
        | {"num_hidden_layers": 24, "vocab_size": 50304},
        1_311_625_216,
    ),
    "opt-350m": (
        OPT | {"do_layer_norm_before": False, "ffn_dim": 4096, "hidden_size": 1024}
        | {"num_attention_heads": 16, "num_hidden_layers": 24, "word_embed_proj_dim": 512},
        331_196_416,
    ),
    "opt-1.3b": (
        OPT | {"do_layer_norm_before": True, "ffn_dim": 8192, "hidden_size": 2048}
        | {"num_attention_heads": 32, "num_hidden_layers": 24, "word_embed_proj_dim": 2048},
        1_315_758_080,
    ),
    "chatglm-6b": (CHATGLM, 6_173_286_400),
}  # fmt: skip


def read(source: dict[str, Any]) -> DecoderConfig:
    return by_source(source, "config.json").config(source, "config.json")


def parameters(config: DecoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_as_many_as_they_should_be(name: str) -> None:
    source, count = PUBLISHED[name]
    assert parameters(read(source)) == count


def test_glm_130b() -> None:
    """Its arguments as its launch script gives them; the paper says 130 billion."""
    arguments = {"num_layers": 70, "hidden_size": 12288, "inner_hidden_size": 32768}
    arguments |= {"num_attention_heads": 96, "vocab_size": 150528, "max_sequence_length": 2048}
    config = read({"model_type": "glm-130b", **arguments})
    assert config.residual_alpha == pytest.approx(140**0.5)
    assert config.prefix == PrefixMarks(start=150_004, whole=150_001, blank=150_000)
    assert parameters(config) == pytest.approx(130e9, rel=0.015)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "MOSS in 4 bits": ("moss-moon-003-sft", {"wbits": 4}, "wbits is 4 but Herdbook knows only 32"),
    "ChatGLM in 4 bits": ("chatglm-6b", {"quantization_bit": 4}, "quantization_bit is 4 but"),
    "ChatGLM with a prefix encoder": ("chatglm-6b", {"pre_seq_len": 128}, "pre_seq_len is 128 but"),
    "heads": ("gpt2", {"n_head": 7}, "7 heads do not divide 768 into even numbers"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "the key 'add_cross_attention'"),
    "by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse"),
    "unscaled": ("gpt-j-6b", {"scale_attn_weights": False}, "scale_attn_weights is False but"),
    "turning": ("gpt-j-6b", {"rotary_dim": 300}, "rotary_dim is 300 but pairs of at most 256"),
    "shards": ("moss-moon-003-sft", {"n_head": 6}, "n_head is 6 but the heads lie in four shards"),
    "share": ("pythia-70m", {"rotary_pct": 0.01}, "rotary_pct is 0.01 but 0 dimensions make no pa"),
    "residual": (
        "bloom-560m",
        {"apply_residual_connection_post_layernorm": True},
        "the key 'apply_residual_connection_post_layernorm'",
    ),
    "inner": ("bloom-560m", {"n_inner": 100}, "n_inner is 100 but Herdbook knows only 4096"),
    "in turn": ("falcon-40b", {"parallel_attn": False}, "do not go together"),
    "groups": ("falcon-40b", {"num_kv_heads": 7}, "128 heads do not divide among 7"),
    "no last norm": ("opt-1.3b", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is"),
    "plain norms": (
        "opt-1.3b",
        {"layer_norm_elementwise_affine": False},
        "elementwise_affine is Fa",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_compute_something_else_is_refused(case: str) -> None:
    name, changes, reason = REFUSED[case]
    with pytest.raises(FamilyError, match=reason) as caught:
        read(PUBLISHED[name][0] | changes)
    assert caught.value.next


def test_dolly_s_pipeline_is_its_own_affair() -> None:
    read(PUBLISHED["pythia-70m"][0] | {"custom_pipelines": {"text-generation": {"pt": "X"}}})
