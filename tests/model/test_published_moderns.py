"""Configurations as they were published, of models too large for a test: each is read whole, and the
decoder that it describes has as many weights as its publisher counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from herdbook.model.checkpoint import expected_shapes
from herdbook.model.families import by_source

BAICHUAN = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "baichuan",
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
SEVEN = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 4096,
}
THIRTEEN = {
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "model_max_length": 4096,
}
CHATGLM2 = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
GLM4 = CHATGLM2 | {
    "_name_or_path": "THUDM/glm4-9b-chat",
    "num_layers": 40,
    "padded_vocab_size": 151552,
    "rope_ratio": 500,
    "seq_length": 131072,
    "layernorm_epsilon": 1.5625e-07,
    "classifier_dropout": None,
}
GEMMA = {
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA2 = GEMMA | {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "sliding_window_size": 4096,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
YI = {
    "architectures": ["YiForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_yi.YiConfig",
        "AutoModel": "modeling_yi.YiModel",
        "AutoModelForCausalLM": "modeling_yi.YiForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "Yi",
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0",
    "use_cache": True,
    "vocab_size": 64000,
}


def sizes(hidden: int, ffn: int, layers: int, heads: int, groups: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


#: model → its config.json, and its weights by its publisher's count (a float where that is rounded)
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "Baichuan-7B": (
        BAICHUAN | SEVEN | {"architectures": ["BaiChuanForCausalLM"], "vocab_size": 64000},
        7_000_559_616,
    ),
    "Baichuan-13B": (
        BAICHUAN | THIRTEEN | {"vocab_size": 64000, "gradient_checkpointing": False},
        13_264_901_120,
    ),
    "Baichuan2-7B": (
        BAICHUAN
        | SEVEN
        | {"vocab_size": 125696, "model_max_length": 4096, "z_loss_weight": 0}
        | {"tokenizer_class": "BaichuanTokenizer", "_from_model_config": True},
        7_505_973_248,
    ),
    "Baichuan2-13B": (
        BAICHUAN | THIRTEEN | {"vocab_size": 125696, "z_loss_weight": 0},
        13_896_668_160,
    ),
    "InternLM-7B": (
        sizes(4096, 11008, 32, 32, 32)
        | {"model_type": "internlm", "vocab_size": 103168, "bias": True}
        | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-06, "pad_token_id": 2},
        7.3e9,
    ),
    "InternLM2-7B": (
        sizes(4096, 14336, 32, 32, 8)
        | {"model_type": "internlm2", "vocab_size": 92544, "bias": False, "rope_theta": 1000000}
        | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "attn_implementation": "eager"}
        | {"max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "hidden_act": "silu"},
        7_737_708_544,
    ),
    "ChatGLM2-6B": (CHATGLM2, 6_243_584_000),
    "GLM-4-9B": (GLM4, 9_399_951_360),
    "Gemma-2B": (GEMMA | sizes(2048, 16384, 18, 8, 1), 2_506_172_416),
    "Gemma-7B": (GEMMA | sizes(3072, 24576, 28, 16, 16), 8_537_680_896),
    "Gemma-2-2B": (
        GEMMA2 | sizes(2304, 9216, 26, 8, 4) | {"query_pre_attn_scalar": 256},
        2_614_341_888,
    ),
    "Gemma-2-9B": (
        GEMMA2 | sizes(3584, 14336, 42, 16, 8) | {"query_pre_attn_scalar": 256},
        9_241_705_984,
    ),
    "Gemma-2-27B": (
        GEMMA2 | sizes(4608, 36864, 46, 32, 16) | {"query_pre_attn_scalar": 144, "head_dim": 128},
        27_227_128_320,
    ),
    "Gemma-3-270M": (GEMMA3 | sizes(640, 2048, 18, 4, 1), 268_098_176),
    "Gemma-3-1B": (GEMMA3 | sizes(1152, 6912, 26, 4, 1), 999_885_952),
    "Mixtral-8x7B": (
        sizes(4096, 14336, 32, 32, 8)
        | {"model_type": "mixtral", "vocab_size": 32000, "sliding_window": None}
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.02, "rope_theta": 1000000.0, "rms_norm_eps": 1e-05}
        | {"max_position_embeddings": 32768, "hidden_act": "silu"},
        46_702_792_704,
    ),
    "Yi-6B": (YI | sizes(4096, 11008, 32, 32, 4), 6_061_035_520),
    "Yi-34B": (YI | sizes(7168, 20480, 60, 56, 8), 34_388_917_248),
    "Aquila-7B": (
        sizes(4096, 11008, 32, 32, 32)
        | {"model_type": "aquila", "vocab_size": 100008, "max_position_embeddings": 2048}
        | {"architectures": ["AquilaForCausalLM"], "rms_norm_eps": 1e-05, "hidden_act": "silu"},
        7.3e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_read_and_counted(name: str) -> None:
    source, weights = PUBLISHED[name]
    family = by_source(source, name)
    config = family.config(source, name)
    count = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    assert count == (weights if isinstance(weights, int) else pytest.approx(weights, rel=0.01))
    alibi = "13B" in name
    assert config.position == ("alibi" if alibi else "rope")
    assert config.head_norm == name.startswith("Baichuan2")
