"""Training against PEFT on the same tiny LLaMA: equal steps, and adapters that each other load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from herdbook.errors import FileError
from herdbook.model.checkpoint import load_decoder
from herdbook.model.decoder import Decoder
from herdbook.model.lora import adapters_of, apply_lora
from herdbook.tokens.chat import Rendering
from herdbook.training import loop, peft_format
from herdbook.training.loop import Plan
from herdbook.training.objective import NextToken
from tests.oracles.peers import ours

#: peft asks transformers for a name that is on its way out
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
STEPS, BATCH, RATE = 4, 3, 5e-3


def rows() -> list[Rendering]:
    generator = torch.Generator().manual_seed(3)
    sizes = [9, 14, 5, 11, 20, 7, 16, 6, 13, 10, 8, 12]
    return [
        Rendering(
            torch.randint(3, 384, (size,), generator=generator).tolist(),
            [k >= size // 3 for k in range(size)],
        )
        for size in sizes
    ]


def peft_model(folder: Path, decoder: Decoder) -> Any:
    """The same model in PEFT with the same start."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    for name, adapter in adapters_of(decoder).items():
        _, number, part, target = name.split(".")
        part = "self_attn" if part == "attention" else "mlp"
        there = theirs.get_submodule(f"base_model.model.model.layers.{number}.{part}.{target}_proj")
        with torch.no_grad():
            there.lora_A["default"].weight.copy_(adapter.A)
            there.lora_B["default"].weight.copy_(adapter.B)
    return theirs


@pytest.fixture
def started(tiny_folder: Path) -> Decoder:
    decoder = load_decoder(tiny_folder, dtype=torch.float32)
    apply_lora(decoder, targets=TARGETS, rank=4, alpha=8)
    return decoder


def test_steps_equal_peft_s(started: Decoder, tiny_folder: Path, tmp_path: Path):
    plan = Plan(
        batch=BATCH, epochs=1, steps=STEPS, pack=64, learning_rate=RATE, schedule="constant",
        floor=0.0, warmup_ratio=0.0, warmup_steps=0, weight_decay=0.01, betas=(0.9, 0.999),
        clip=1.0, optimiser="adamw", average=0.0, precision="float32", seed=5, save_every=100,
    )  # fmt: skip
    theirs = peft_model(tiny_folder, started).train()
    parameters = {
        f"{name}.{m}": getattr(adapter, m)
        for name, adapter in adapters_of(started).items()
        for m in ("A", "B")
    }
    state = loop.train(NextToken(started.train()), parameters, rows(), plan, tmp_path)

    trained = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), weight_decay=0.01)
    losses = []
    for cut in loop.batches(plan, len(rows())):
        batch = [rows()[n] for n in cut]
        width = max(len(row.ids) for row in batch)
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in batch])
        attended = torch.tensor([[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in batch])
        labels = torch.tensor(
            [
                [i if on else -100 for i, on in zip(row.ids, row.mask, strict=True)]
                + [-100] * (width - len(row.ids))
                for row in batch
            ]
        )
        logits = theirs(input_ids=ids, attention_mask=attended).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())

    assert [record["loss"] for record in state.records] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
    theirs.eval()
    ids = rows()[4].ids
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours(started.eval(), ids), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group, last_layers", [(1, 0), (32, 0), (1, 2)])
def test_peft_loads_our_adapter_with_the_same_logits(
    tiny_folder: Path, tmp_path: Path, group: int, last_layers: int
):
    decoder = load_decoder(tiny_folder, dtype=torch.float32)
    adapters = apply_lora(
        decoder, targets=("q", "v", "down"), rank=4, alpha=8, group=group, last_layers=last_layers
    )
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.2)
    peft_format.save(decoder, tmp_path, base="base")
    ids = rows()[4].ids
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        untuned = base(torch.tensor([ids])).logits[0]
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()(torch.tensor([ids])).logits[0]
    assert (theirs - untuned).abs().max() > 0.1
    torch.testing.assert_close(ours(decoder, ids), theirs, rtol=0, atol=1e-4)

    back = load_decoder(tiny_folder, dtype=torch.float32)
    assert peft_format.load(back, tmp_path).keys() == adapters.keys()
    torch.testing.assert_close(ours(back, ids), ours(decoder, ids), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments ..base_computed', 'base_kept'")
def test_peft_loads_an_adapter_that_learnt_beside_nf4(tiny_folder: Path, tmp_path: Path):
    """It warns of the two keys that say so, and leaves them out. On the base's own weights both are
    the same; beside NF4, where it learnt, the model says something else."""
    beside = load_decoder(tiny_folder, dtype=torch.float32, nf4=True)
    for adapter in apply_lora(beside, targets=TARGETS, rank=4, alpha=8).values():
        torch.nn.init.normal_(adapter.B, std=0.2)
    peft_format.save(beside, tmp_path, base="base", kept="nf4")
    ids = rows()[4].ids
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()(torch.tensor([ids])).logits[0]
    back = load_decoder(tiny_folder, dtype=torch.float32)
    peft_format.load(back, tmp_path)
    torch.testing.assert_close(ours(back, ids), theirs, rtol=0, atol=1e-4)
    assert (ours(beside, ids) - theirs).abs().max() > 1e-3


def test_we_load_peft_s_adapter(started: Decoder, tiny_folder: Path, tmp_path: Path):
    theirs = peft_model(tiny_folder, started)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    ids = rows()[1].ids
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor([ids])).logits[0]
    decoder = load_decoder(tiny_folder, dtype=torch.float32)
    peft_format.load(decoder, tmp_path)
    torch.testing.assert_close(ours(decoder, ids), wanted, rtol=0, atol=1e-4)


def test_an_adapter_that_brings_more_is_refused(tiny_folder: Path, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules=["q_proj"], bias="all")
    get_peft_model(base, settings).save_pretrained(tmp_path)
    with pytest.raises(FileError, match=r"bias is 'all' and only none can be read"):
        peft_format.load(load_decoder(tiny_folder, dtype=torch.float32), tmp_path)
