"""Adapters of every decoder, packed and turned matrices too: peft computes with ours, and we with its.

On Mixtral's experts peft has no adapters for transformers 5, which keeps them as one tensor a layer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from herdbook.model.checkpoint import load_decoder
from herdbook.model.lora import TARGETS, apply_lora
from herdbook.training import peft_format
from tests.oracles.peers import differ, make, ours, prompt, theirs
from tests.oracles.shapes import SHAPES, stem

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ATTENTION = ("q", "k", "v", "o")
#: what peft is told to tune, the first with a rank of its own
MODULES = {
    "GPT2": ["c_attn", "mlp.c_proj"],
    "GPTJ": ["q_proj", "k_proj", "fc_in"],
    "CodeGen": ["qkv_proj", "out_proj"],
    "GPTNeoX": ["query_key_value", "dense_4h_to_h"],
    "Bloom": ["query_key_value", "dense"],
    "Falcon": ["query_key_value", "dense_h_to_4h"],
    "OPT": ["q_proj", "v_proj", "fc1"],
    "Mixtral": ["q_proj", "v_proj"],
    "Glm": ["q_proj", "v_proj", "gate_up_proj"],
    "Glm4": ["q_proj", "v_proj", "gate_up_proj"],
}


@pytest.mark.parametrize("targets", [tuple(TARGETS), ("q", "v", "down"), ("o",)])
@pytest.mark.parametrize("shape", SHAPES)
def test_peft_computes_with_our_adapter(
    shape: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    base = make(shape, tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    if decoder.config.experts:
        targets = tuple(one for one in targets if one in ATTENTION)
    last = 2 if targets == ("o",) else 0
    adapters = apply_lora(decoder, targets=targets, rank=4, alpha=6, last_layers=last)
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.2)
    peft_format.save(decoder, tmp_path / "adapter", base="base")
    untuned = theirs(base, prompt(40))
    tuned = theirs(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), prompt(40))
    assert differ(tuned, untuned) > 0.1
    assert differ(tuned, ours(decoder, prompt(40))) <= 2e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_we_compute_with_peft_s_adapter(shape: str, tmp_path: Path) -> None:
    base = make(shape, tmp_path / "base")
    family = stem(SHAPES[shape][0])
    modules = MODULES.get(family, ["q_proj", "v_proj", "down_proj"])
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=modules,
        rank_pattern={modules[0]: 7},
        fan_in_fan_out=family == "GPT2",
    )
    peer = get_peft_model(base, config).eval()
    for name, parameter in peer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peer.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    untuned = ours(decoder, prompt(40))
    peft_format.load(decoder, tmp_path / "adapter")
    tuned = ours(decoder, prompt(40))
    assert differ(tuned, untuned) > 0.1
    assert differ(tuned, theirs(peer, prompt(40))) <= 2e-4
