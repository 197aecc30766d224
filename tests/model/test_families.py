"""Descriptions: names that go both ways, configurations read whole or refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from herdbook.errors import FamilyError
from herdbook.model.checkpoint import expected_shapes
from herdbook.model.config import RopeScaling
from herdbook.model.families import by_gguf, by_model_type, families
from herdbook.model.family import HARMLESS, permute, unpermute

SOURCE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def read(family: str = "llama", **changes: Any) -> Any:
    return families()[family].config(SOURCE | changes, "config.json")


@pytest.mark.parametrize("family", families().values(), ids=families().keys())
def test_names_are_a_bijection(family: Any) -> None:
    config = family.config(SOURCE | {"model_type": family.model_type}, "config.json")
    ours = list(expected_shapes(config))
    for rename in (family.hf_name, family.gguf_name):
        theirs = [rename(name) for name in ours]
        assert len(set(theirs)) == len(ours) and not any("{" in name for name in theirs)
    for column in (0, 1):
        assert len({row[column] for row in family.names.values()}) == len(family.names)
    modules = {re.sub(r"\.\d+\.", ".{n}.", name.rpartition(".")[0]) for name in ours}
    assert modules == set(family.names), "no row without a module, no module without a row"


@pytest.mark.parametrize("family", families().values(), ids=families().keys())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rope_theta": 5e5, "head_dim": 16},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}},
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 5},
    ],
)
def test_what_is_written_is_read_again(family: Any, changes: dict[str, Any]) -> None:
    if "sliding_window" in changes and family.model_type == "llama":
        return
    changes = dict(changes)
    if family.model_type == "mistral":
        for key in ("use_sliding_window", "max_window_layers"):
            changes.pop(key, None)
    config = family.config(SOURCE | changes, "config.json")
    assert family.config(family.source(config), "config.json") == config


def test_rope_parameters_of_transformers_5() -> None:
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = read(rope_parameters=rope)
    assert config.rope_base == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 64, 1.0, 4.0)


def test_unknown_model_type_names_the_known() -> None:
    with pytest.raises(FamilyError) as caught:
        by_model_type("mixtral", "x/config.json")
    assert str(caught.value) == (
        "x/config.json: the model_type 'mixtral' is not one of the families that Herdbook knows: "
        "llama, mistral, qwen2, qwen3\n"
        "  next: did you mean 'mistral'?; or describe it in herdbook/model/families"
    )
    with pytest.raises(FamilyError, match="the architecture 'rwkv6' is not one of those"):
        by_gguf("rwkv6", {}, "m.gguf")


def test_a_gguf_llama_with_a_window_is_a_mistral() -> None:
    assert by_gguf("llama", {"llama.attention.sliding_window": 4096}, "").model_type == "mistral"
    assert by_gguf("llama", {}, "").model_type == "llama"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "relu2"}, "hidden_act is 'relu2' known are: silu"),
    "rope type": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
        "rope_type is 'longrope' known are: default, linear, llama3, yarn",
    ),
    "rope key": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}},
        "the key 'mscale' .0.7. is unknown",
    ),
    "partial rotation": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is set",
    ),
    "softcap": ({"final_logit_softcapping": 30.0}, "the key 'final_logit_softcapping'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "the key 'quantization_config'"),
    "missing": ({"hidden_size": None}, "hidden_size is None but must be a whole number"),
    "text": ({"hidden_size": "64"}, "hidden_size is '64' but must be a whole number"),
    "huge": ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776"),
    "eps": ({"rms_norm_eps": -1}, "rms_norm_eps is -1 but must be a number above 0"),
    "flag": ({"attention_bias": "no"}, "attention_bias is 'no' but must be true or false"),
    "groups": ({"num_key_value_heads": 3}, "8 heads do not divide among 3"),
    "odd head": ({"head_dim": 7}, "head_dim is 7 but a rotation turns pairs"),
    "window on llama": ({"sliding_window": 512}, "the key 'sliding_window'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_result_is_refused(case: str) -> None:
    changes, reason = REFUSED[case]
    with pytest.raises(FamilyError, match=reason) as caught:
        read(**changes)
    assert caught.value.next


def test_harmless_keys_pass() -> None:
    read(torch_dtype="bfloat16", bos_token_id=1, attention_dropout=0.1, unsloth_version="2026.1")
    read(alibi=False, quantization_config=None, _name_or_path="x", use_cache=True)
    assert not HARMLESS.fullmatch("rope_theta")


def test_qwens_windows() -> None:
    assert read("qwen2", sliding_window=9).windows == ()
    some = read("qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=10)
    assert some.windows == (None,) * 10 + (9, 9)
    with pytest.raises(FamilyError, match="no sliding window is in use"):
        read("qwen3", layer_types=["sliding_attention"] * 12)


def test_permutation_is_the_fact_sheets_and_goes_back() -> None:
    rows = np.arange(24 * 3).reshape(24, 3)
    ours = unpermute(rows, 2)  # GGUF → half style: 2 heads of 12, pairs (2i, 2i+1) → (i, i+6)
    assert (ours[:12, 0] // 3).tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert np.array_equal(permute(ours, 2), rows)
    assert np.array_equal(permute(rows[:, 0], 2), permute(rows, 2)[:, 0]), "biases alike"
