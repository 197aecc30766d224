"""The decoders that transformers knows, in small: a row a shape, and every test of the table runs on it.

Weights, biases and norms are large enough that a wrong row order, rotation, mask or norm shows; the
prompts are longer than the windows and the original contexts of the scaled rotations.
"""

from __future__ import annotations

import re
from typing import Any

VOCAB = 120
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OLD: dict[str, Any] = {"vocab_size": VOCAB, "initializer_range": 0.2} | IDS
GPT = OLD | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
HF = OLD | {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
NEOX = HF | {"intermediate_size": 96, "max_position_embeddings": 256}
BLOOM = OLD | {"hidden_size": 64, "n_layer": 3, "n_head": 4}
GROUPS = {"new_decoder_architecture": True, "num_kv_heads": 2}
OPT = HF | {"ffn_dim": 96, "max_position_embeddings": 256, "init_std": 0.2}
SIZES: dict[str, Any] = IDS | {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
GEMMA = SIZES | {"head_dim": 32, "initializer_range": 0.2}
GEMMA2 = GEMMA | {"sliding_window": 7, "query_pre_attn_scalar": 32}
GEMMA3 = GEMMA2 | {"num_hidden_layers": 7}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT),
    "cerebras": ("GPT2LMHeadModel", GPT | {"activation_function": "gelu", "n_inner": 96}),
    "gptj": ("GPTJForCausalLM", GPT | {"rotary_dim": 8}),
    "codegen": ("CodeGenForCausalLM", GPT | {"rotary_dim": 8, "n_head": 8}),
    "codegen-whole": ("CodeGenForCausalLM", GPT | {"rotary_dim": 16}),
    "neox": ("GPTNeoXForCausalLM", NEOX),
    "neox-incite": ("GPTNeoXForCausalLM", NEOX | {"use_parallel_residual": False}),
    "bloom": ("BloomForCausalLM", BLOOM),
    "bloom-6-heads": ("BloomForCausalLM", BLOOM | {"hidden_size": 96, "n_layer": 2, "n_head": 6}),
    "falcon-7b": ("FalconForCausalLM", HF),
    "falcon-40b": ("FalconForCausalLM", HF | GROUPS),
    "falcon-11b": ("FalconForCausalLM", HF | GROUPS | {"num_ln_in_parallel_attn": 1}),
    "falcon-rw": ("FalconForCausalLM", HF | FALCON_RW),
    "opt": ("OPTForCausalLM", OPT),
    "opt-350m": (
        "OPTForCausalLM",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
    "llama": ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 4}),
    "llama-tied": ("LlamaForCausalLM", SIZES | {"tie_word_embeddings": True}),
    "llama3-scaling": ("LlamaForCausalLM", SIZES | {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama-linear": (
        "LlamaForCausalLM",
        SIZES | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "llama-yarn": ("LlamaForCausalLM", SIZES | {"rope_scaling": YARN}),
    "llama-biases": ("LlamaForCausalLM", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaForCausalLM", SIZES | {"head_dim": 32}),
    "mistral-window": ("MistralForCausalLM", SIZES | {"sliding_window": 7}),
    "mistral": ("MistralForCausalLM", SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", SIZES | {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-windows": ("Qwen2ForCausalLM", SIZES | WINDOWS),
    "qwen3": ("Qwen3ForCausalLM", SIZES | {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3-bias": ("Qwen3ForCausalLM", SIZES | {"head_dim": 16, "attention_bias": True}),
    "gemma": ("GemmaForCausalLM", GEMMA | {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA2),
    "gemma2-27b": ("Gemma2ForCausalLM", GEMMA2 | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", GEMMA3),
    "gemma3-4b": ("Gemma3ForCausalLM", GEMMA3 | {"rope_parameters": GEMMA3_ROPE}),
    "mixtral": ("MixtralForCausalLM", SIZES | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": (
        "MixtralForCausalLM",
        SIZES | {"sliding_window": 9, "num_experts_per_tok": 3},
    ),
    "glm": ("GlmForCausalLM", SIZES | {"head_dim": 16, "attention_bias": True}),
    "glm-no-bias": (
        "GlmForCausalLM",
        SIZES | {"head_dim": 16, "attention_bias": False, "num_key_value_heads": 4},
    ),
    "glm-wide": ("GlmForCausalLM", SIZES | {"head_dim": 32, "attention_bias": False}),
    "glm4": ("Glm4ForCausalLM", SIZES | {"head_dim": 16, "attention_bias": True}),
    "glm4-wide": ("Glm4ForCausalLM", SIZES | {"head_dim": 32, "attention_bias": False}),
}
#: what GGUF cannot say, and why: llama.cpp does not know the family or the form, it wants one window
#: for all layers, it scales scores by the head's width unless there are 46 layers, its Qwen 3 has no
#: biases, or the heads of its ChatGLM fill the hidden state
NOT_IN_GGUF = dict.fromkeys(
    (shape for shape in SHAPES if re.match("cerebras|gptj|codegen|opt|falcon-rw", shape)),
    "cannot be written as GGUF",
) | {
    "qwen2-windows": "cannot be written as GGUF",
    "gemma2-27b": r"attention_scale 0\.25 cannot be written as GGUF",
    "qwen3-bias": "attention_bias cannot be written as GGUF",
    "glm-wide": "4 heads of 32 and a hidden state of 64 cannot be written as GGUF",
}
IN_GGUF = [shape for shape in SHAPES if shape not in NOT_IN_GGUF]


def stem(name: str) -> str:
    """The family in the name of a class of transformers: "GPT2LMHeadModel" → "GPT2"."""
    return re.sub(r"(ForCausalLM|LMHeadModel)$", "", name)
