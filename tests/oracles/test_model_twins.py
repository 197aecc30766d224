"""The families of 2023 that transformers does not know: against its LLaMA and GLM with the same weights,
against golden files of the original code, and, where neither tells enough (ALiBi), against a plain
computation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from herdbook.errors import FamilyError
from herdbook.model.checkpoint import load_decoder, save_gguf, save_hf
from herdbook.model.layout import Packed
from tests.oracles.peers import cached_replies_agree, differ, ours, prompt, random_model, theirs
from tests.oracles.shapes import SIZES, VOCAB

State = dict[str, Tensor]


def layers(state: State) -> range:
    return range(1 + max(int(name.split(".")[2]) for name in state if ".layers." in name))


def baichuan(state: State) -> State:
    for n in layers(state):
        at = f"model.layers.{n}.self_attn."
        parts = [state.pop(f"{at}{one}_proj.weight") for one in "qkv"]
        state[f"{at}W_pack.weight"] = torch.cat(parts)
        state[f"{at}rotary_emb.inv_freq"] = torch.zeros(8)  # published files carry it
    return state


def yi(state: State) -> State:
    new = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    renamed = {}
    for name, tensor in state.items():
        for old, its in new.items():
            name = name.replace(old, its)
        renamed[name] = tensor
    return renamed


def internlm2(state: State) -> State:
    made: State = {}
    for n in layers(state):
        at, to = f"model.layers.{n}.", f"model.layers.{n}.attention."
        q, k, v = (state.pop(f"{at}self_attn.{one}_proj.weight") for one in "qkv")
        groups = SIZES["num_key_value_heads"]
        q, k, v = (one.view(groups, -1, 16, 64) for one in (q, k, v))
        made[f"{to}wqkv.weight"] = torch.cat([q, k, v], 1).reshape(-1, 64)
        made[f"{to}wo.weight"] = state.pop(f"{at}self_attn.o_proj.weight")
        for old, new in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            made[f"{at}feed_forward.{new}.weight"] = state.pop(f"{at}mlp.{old}_proj.weight")
        made[f"{at}attention_norm.weight"] = state.pop(f"{at}input_layernorm.weight")
        made[f"{at}ffn_norm.weight"] = state.pop(f"{at}post_attention_layernorm.weight")
    made["model.tok_embeddings.weight"] = state.pop("model.embed_tokens.weight")
    made["model.norm.weight"] = state.pop("model.norm.weight")
    made["output.weight"] = state.pop("lm_head.weight")
    assert not state
    return made


def chatglm2(state: State) -> State:
    made: State = {}
    for n in layers(state):
        at, to = f"model.layers.{n}.", f"transformer.encoder.layers.{n}."
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{at}self_attn.{one}_proj.{leaf}") for one in "qkv"]
            made[f"{to}self_attention.query_key_value.{leaf}"] = torch.cat(parts)
        made[f"{to}self_attention.dense.weight"] = state.pop(f"{at}self_attn.o_proj.weight")
        made[f"{to}mlp.dense_h_to_4h.weight"] = state.pop(f"{at}mlp.gate_up_proj.weight")
        made[f"{to}mlp.dense_4h_to_h.weight"] = state.pop(f"{at}mlp.down_proj.weight")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{to}{norm}.weight"] = state.pop(f"{at}{norm}.weight")
    made["transformer.embedding.word_embeddings.weight"] = state.pop("model.embed_tokens.weight")
    made["transformer.encoder.final_layernorm.weight"] = state.pop("model.norm.weight")
    made["transformer.output_layer.weight"] = state.pop("lm_head.weight")
    made["transformer.rotary_pos_emb.inv_freq"] = torch.zeros(4)
    assert not state
    return made


LLAMA_KEYS = {
    key: SIZES[key]
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
} | {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
WHOLE = {"num_key_value_heads": 4}
BAICHUAN = {"num_hidden_layers": 32, "initializer_range": 0.1}  # by 32 layers GGUF knows it
GLM = {"head_dim": 16, "pad_token_id": 0}
CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": VOCAB,
    "seq_length": 256,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "fp32_residual_connection": False,
    "original_rope": True,
    "quantization_bit": 0,
    "pre_seq_len": None,
    "prefix_projection": False,
}
#: name → transformers' twin and its settings, the published config.json, how its tensors lie there
TWINS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[State], State]]] = {
    "baichuan-7b": (
        "Llama",
        WHOLE | BAICHUAN,
        LLAMA_KEYS
        | {
            "model_type": "baichuan",
            "architectures": ["BaiChuanForCausalLM"],
            "num_hidden_layers": 32,
        },
        baichuan,
    ),
    "internlm-7b": (
        "Llama",
        WHOLE | {"attention_bias": True},
        LLAMA_KEYS
        | {"model_type": "internlm", "bias": True, "rotary": {"base": 10000, "type": "dynamic"}},
        lambda state: state,
    ),
    "internlm-20b": (
        "Llama",
        WHOLE,
        LLAMA_KEYS | {"model_type": "internlm", "bias": False},
        lambda state: state,
    ),
    "internlm2-7b": (
        "Llama",
        {"rope_theta": 1e6},
        LLAMA_KEYS
        | {
            "model_type": "internlm2",
            "num_key_value_heads": 2,
            "bias": False,
            "rope_theta": 1000000,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "attn_implementation": "eager",
        },
        internlm2,
    ),
    "aquila-7b": (
        "Llama",
        WHOLE,
        LLAMA_KEYS | {"model_type": "aquila", "architectures": ["AquilaForCausalLM"]},
        lambda state: state,
    ),
    "yi-6b": (
        "Llama",
        {"rope_theta": 5e6},
        LLAMA_KEYS
        | {"model_type": "Yi", "architectures": ["YiForCausalLM"]}
        | {"num_key_value_heads": 2, "rope_theta": 5000000.0},
        yi,
    ),
    "chatglm2-6b": (
        "Glm",
        GLM | {"attention_bias": True, "rms_norm_eps": 1e-5},
        CHATGLM,
        chatglm2,
    ),
    "chatglm2-6b-32k": (
        "Glm",
        GLM
        | {"attention_bias": True, "rms_norm_eps": 1e-5}
        | {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 8.0,
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        CHATGLM | {"rope_ratio": 8, "_name_or_path": "THUDM/chatglm2-6b-32k"},
        chatglm2,
    ),
    "chatglm3-6b-32k": (
        "Glm",
        GLM | {"attention_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
        CHATGLM | {"rope_ratio": 50},
        chatglm2,
    ),
}


def twin(name: str, folder: Path) -> Any:
    """A model of transformers, and in the folder the same one as its publisher would have saved it."""
    kind, settings, config, pack = TWINS[name]
    model = random_model(f"{kind}ForCausalLM", SIZES | settings, sum(map(ord, name)))
    state = pack({key: value.clone() for key, value in model.state_dict().items()})
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "m.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_of_transformers(name: str, tmp_path: Path) -> None:
    model = twin(name, tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    want = theirs(model, prompt(150))
    assert want.std() > 0.5
    assert differ(ours(decoder, prompt(150)), want) <= 1e-4
    cached_replies_agree(decoder, model)

    save_hf(decoder, None, tmp_path / "ours", torch.float32)
    first, again = (
        load_file(one) for one in (tmp_path / "m.safetensors", tmp_path / "ours/model.safetensors")
    )
    assert {name for name in first if "inv_freq" not in name} == set(again)
    assert all(torch.equal(first[name], again[name]) for name in again)

    save_gguf(decoder, None, tmp_path / "model.gguf", "F32")
    back = load_decoder(tmp_path / "model.gguf", dtype=torch.float32)
    assert differ(ours(back, prompt(150)), want) <= 1e-4
    save_hf(back, None, tmp_path / "from_gguf", torch.float32)
    once_more = load_decoder(tmp_path / "from_gguf", dtype=torch.float32)
    assert differ(ours(once_more, prompt(150)), want) <= 1e-4


def test_baichuan_2_norms_the_rows_of_its_head(tmp_path: Path) -> None:
    model = twin("baichuan-7b", tmp_path)
    config = TWINS["baichuan-7b"][2] | {"z_loss_weight": 0, "model_max_length": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.copy_(F.normalize(model.lm_head.weight, dim=1))
    want = theirs(model, prompt(150))
    assert differ(ours(decoder, prompt(150)), want) <= 1e-4
    save_hf(decoder, None, tmp_path / "ours", torch.float32)
    kept = load_file(tmp_path / "ours" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(kept, load_file(tmp_path / "m.safetensors")["lm_head.weight"])
    # llama.cpp does not norm it, so the file's head is normed
    save_gguf(decoder, None, tmp_path / "model.gguf", "F32")
    back = load_decoder(tmp_path / "model.gguf", dtype=torch.float32)
    assert not back.config.head_norm
    assert differ(ours(back, prompt(150)), want) <= 1e-4


@pytest.mark.parametrize(("heads", "hidden"), [(4, 64), (6, 96), (5, 80)])
def test_baichuan_13b_is_a_llama_with_alibi(heads: int, hidden: int, tmp_path: Path) -> None:
    """transformers' layers around an attention written out: scores/√d + slope · (key − query)."""
    settings = {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": hidden}
    model = random_model("LlamaForCausalLM", SIZES | settings, 13)
    state = baichuan({key: value.clone() for key, value in model.state_dict().items()})
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "m.safetensors")
    config = LLAMA_KEYS | {"num_attention_heads": heads, "hidden_size": hidden}
    config |= {"model_type": "baichuan", "model_max_length": config.pop("max_position_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(config))

    power = 4
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    back = (torch.arange(150) - torch.arange(150)[:, None]).float()
    bias = torch.tensor(slopes)[:, None, None] * back + torch.full((150, 150), -1e30).triu(1)

    def attend(layer: Any, x: Tensor) -> Tensor:
        q, k, v = (
            one(x).view(150, heads, 16).transpose(0, 1)
            for one in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        weights = (q @ k.transpose(1, 2) / 4 + bias).softmax(-1)
        return layer.o_proj((weights @ v).transpose(0, 1).reshape(150, hidden))

    with torch.inference_mode():
        x = model.model.embed_tokens(torch.tensor(prompt(150)))
        for layer in model.model.layers:
            x = x + attend(layer.self_attn, layer.input_layernorm(x))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        want = model.lm_head(model.model.norm(x))
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    assert decoder.config.position == "alibi"
    assert differ(ours(decoder, prompt(150)), want) <= 1e-4
    with pytest.raises(FamilyError, match="Baichuan of 3 layers cannot be written as GGUF"):
        save_gguf(decoder, None, tmp_path / "model.gguf", "F32")


@pytest.mark.parametrize("name", ["baichuan-7b", "baichuan-13b", "chatglm2-6b"])
def test_golden_files_of_the_original_code(name: str, shared_data: Callable[[str], Path]) -> None:
    """Five tokens, in one pass and as three steps with a cache."""
    folder = shared_data(f"golden/{name}")
    decoder = load_decoder(folder, dtype=torch.float32)
    steps = load_file(folder / "expected.safetensors")
    ids = torch.cat([steps[f"step{i}.input_ids"] for i in range(3)])
    want = torch.cat([steps[f"step{i}.last_hidden_state"] for i in range(3)])
    with torch.inference_mode():
        assert differ(decoder(ids, Packed([len(ids)])), want) <= 1e-5
