"""Checkpoints as they lie on the hub, against transformers: bare models, and text beside other parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_hf
from herdbook.model.families import by_source
from herdbook.model.layout import Packed
from tests.oracles.peers import differ, make, ours, prompt, theirs
from tests.oracles.shapes import GEMMA3, SIZES


@pytest.mark.parametrize("shape", ["gpt2", "bloom", "opt-350m"])
def test_a_model_published_without_its_prefix(shape: str, tmp_path: Path) -> None:
    """gpt2 and bloom lie on the hub as the bare model, GPT-2 with its causal masks among the weights."""
    model = make(shape, tmp_path)
    file = tmp_path / "model.safetensors"
    bare = {re.sub(r"^(transformer|model)\.", "", n): t for n, t in load_file(file).items()}
    if shape == "gpt2":
        bare["h.0.attn.bias"] = torch.ones(256, 256).tril().view(1, 1, 256, 256)
        bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, file)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    assert differ(ours(decoder, prompt(40)), theirs(model, prompt(40))) <= 1e-4


def test_a_base_model_without_prefix_and_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    ids = prompt(20)
    with torch.inference_mode():
        want = model(torch.tensor([ids])).last_hidden_state[0]
        assert differ(decoder(torch.tensor(ids), Packed([20])), want) <= 1e-4
    assert open_checkpoint(tmp_path).headless


def test_the_text_part_of_a_gemma_3_with_eyes(tmp_path: Path) -> None:
    text = {key: value for key, value in GEMMA3.items() if key != "attn_implementation"}
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=eyes | {"num_attention_heads": 2, "patch_size": 14}
    )
    torch.manual_seed(3)
    model = transformers.Gemma3ForConditionalGeneration(config).eval().float()
    model.save_pretrained(tmp_path / "theirs")
    assert any("vision" in one for one in load_file(tmp_path / "theirs" / "model.safetensors"))
    decoder = load_decoder(tmp_path / "theirs", dtype=torch.float32)
    want = theirs(model, prompt(60))
    assert differ(ours(decoder, prompt(60)), want) <= 1e-4
    save_hf(decoder, None, tmp_path / "text", torch.float32)
    alone = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "text").eval().float()
    assert differ(theirs(alone, prompt(60)), want) <= 1e-4


def test_a_gemma_3_of_4b_says_only_what_differs() -> None:
    source = {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152},
        "mm_tokens_per_image": 256,
    }
    config = by_source(source, "4b").config(source, "4b")
    assert (config.heads, config.kv_heads, config.head_dim, config.vocab) == (8, 4, 256, 262_208)
    assert config.windows[:6] == (1024,) * 5 + (None,) and config.rope_base == 1e6
