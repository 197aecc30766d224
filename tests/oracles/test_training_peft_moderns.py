"""Adapters on Gemma, Mixtral and GLM: peft computes with ours what we do, and we with its.

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
from tests.oracles.test_model_moderns import SHAPES, differ, make, ours, prompt, theirs

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
ATTENTION = ("q", "k", "v", "o")


@pytest.mark.parametrize("shape", SHAPES)
def test_peft_computes_with_our_adapter(shape: str, tmp_path: Path) -> None:
    base = make(shape, tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    targets = ATTENTION if decoder.config.experts else TARGETS
    for adapter in apply_lora(decoder, targets=targets, rank=4, alpha=6).values():
        torch.nn.init.normal_(adapter.B, std=0.2)
    peft_format.save(decoder, tmp_path / "adapter", base="base")
    untuned = theirs(base, prompt(40))
    tuned = theirs(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), prompt(40))
    assert differ(tuned, untuned) > 0.1
    assert differ(tuned, ours(decoder, prompt(40))) <= 2e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_we_compute_with_peft_s_adapter(shape: str, tmp_path: Path) -> None:
    base = make(shape, tmp_path / "base")
    modules = ["q_proj", "v_proj", *(["gate_up_proj"] if "glm" in shape else [])]
    peer = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=modules)).eval()
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
