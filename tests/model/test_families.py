"""Descriptions: names that go both ways, configurations read whole or refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import FamilyError
from herdbook.model.config import DecoderConfig, RopeScaling
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_gguf, by_source, families
from herdbook.model.family import GGUF_ROTATING, Family
from herdbook.model.keys import HARMLESS
from herdbook.model.layout import Packed
from herdbook.model.modules import build

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


def random_decoder(config: DecoderConfig) -> Decoder:
    decoder = build(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.3)
    return decoder.eval()


#: a small configuration of every family, as its config.json has it: tests/model/families/*.json
FIXTURES = {path.stem: path for path in sorted((Path(__file__).parent / "families").glob("*.json"))}


def test_every_family_has_a_fixture() -> None:
    assert {name.partition("-")[0] for name in FIXTURES} == set(families())


def of_fixture(name: str) -> tuple[Family, DecoderConfig]:
    """A family and the configuration of its fixture; «falcon-rw» is another one of falcon."""
    source = json.loads(FIXTURES[name].read_text())
    family = by_source(source, name)
    return family, family.config(source, name)


@pytest.fixture(params=FIXTURES)
def described(request: Any) -> tuple[Family, DecoderConfig]:
    return of_fixture(request.param)


def test_the_engine_gives_what_a_plain_pass_gives(described: tuple[Family, DecoderConfig]) -> None:
    """Chunked prefill, batching and paged decoding on every set of axes: the same greedy tokens."""
    _, config = described
    decoder = random_decoder(config)
    dice = random.Random(5)
    marks = [config.prefix.whole, config.prefix.start] if config.prefix else []
    prompts = [[dice.randrange(1, config.vocab) for _ in range(n)] + marks for n in (1, 9, 23, 23)]
    engine = Engine(decoder, None, page_tokens=4, pages=64, max_batch_tokens=16)
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    replies = engine.generate([Request(ids, sampling) for ids in prompts])
    for ids, reply in zip(prompts, replies, strict=True):
        whole = decoder.prompt(ids)
        for _ in range(8):
            with torch.inference_mode():
                hidden = decoder(torch.tensor(whole), Packed([len(whole)]))
                whole.append(int(decoder.logits(hidden[-1:]).argmax()))
        assert list(reply.ids) == whole[-8:]


def test_a_fixture_is_written_and_read_again(described: tuple[Family, DecoderConfig]) -> None:
    family, config = described
    assert family.config(family.source(config), "config.json") == config


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
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
def test_what_is_written_is_read_again(name: str, changes: dict[str, Any]) -> None:
    family = families()[name]
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
        by_source({"model_type": "mistrel"}, "x/config.json")
    what, _, next = str(caught.value).partition("\n")
    assert what.startswith("x/config.json: the model_type 'mistrel' is not one of the families ")
    assert ", llama, mistral, " in what
    assert next == "  next: did you mean 'mistral'?; or describe it in herdbook/model/families"
    with pytest.raises(FamilyError, match="the architecture 'rwkv6' is not one of those"):
        by_gguf("rwkv6", {}, (), "m.gguf")


def test_families_that_share_an_architecture_of_gguf() -> None:
    def found(architecture: str, metadata: dict[str, Any], *names: str) -> str:
        tensors = {f"blk.0.{name}.weight" for name in names}
        return by_gguf(architecture, metadata, tensors, "").name

    dense = ("attn_q", "ffn_gate", "ffn_up", "ffn_down")
    assert found("llama", {}, *dense) == "llama"
    windowed = {"llama.attention.sliding_window": 4096}
    assert found("llama", windowed, *dense) == "mistral"
    experts = ("attn_q", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    assert found("llama", {}, *experts) == found("llama", windowed, *experts) == "mixtral"
    assert found("chatglm", {}, "attn_qkv", "ffn_up", "ffn_down") == "chatglm2"
    assert found("chatglm", {}, "attn_q", "ffn_up", "ffn_down") == "glm"
    assert found("llama", {}, "nothing") == "llama", "whose tensors will be found missing"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "relu2"}, "hidden_act is 'relu2' known are: silu"),
    "rope type": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}},
        "rope_type is 'longrope' known are: default, dynamic, linear, llama3, yarn",
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


def test_ggufs_order_is_the_fact_sheets() -> None:
    """Pairs (2i, 2i + 1) of the file are our i and i + 6."""
    config = read(hidden_size=96, num_attention_heads=8)  # heads of 12
    rows = torch.arange(96 * 3).view(96, 3)
    ours = GGUF_ROTATING["blk.{n}.attn_q"].take(rows, 0, [96], config)
    assert (ours[:12, 0] // 3).tolist() == [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
