"""rsLoRA, DoRA, IA3 and layers trained whole: peft computes with ours, and we with its."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from herdbook.errors import FileError
from herdbook.model.checkpoint import load_decoder
from herdbook.model.decoder import Decoder
from herdbook.model.dora import DoRALinear
from herdbook.model.ia3 import apply_ia3
from herdbook.model.lora import adapters_of, apply_lora, merge_lora
from herdbook.model.whole import train_rows, train_whole
from herdbook.training import peft_format
from tests.oracles.peers import differ, make, ours, prompt, theirs
from tests.oracles.shapes import SHAPES, stem
from tests.oracles.test_training_peft_shapes import ATTENTION, MODULES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]

KINDS = ("rslora", "dora", "ia3", "whole", "rows")
#: ids whose rows are trained
ROWS = [3, 7, 8]


def put(decoder: Decoder, kind: str, targets: tuple[str, ...]) -> None:
    """Adapters of that kind, with something in them."""
    if decoder.config.experts:
        targets = tuple(one for one in targets if one in ATTENTION)
    if kind == "ia3":
        apply_ia3(decoder, targets=targets)
    elif kind == "dora":
        apply_lora(decoder, targets=targets, rank=4, alpha=6, kind=DoRALinear)
    else:
        apply_lora(decoder, targets=targets, rank=4, alpha=6, rslora=kind == "rslora")
    if kind == "whole":
        train_whole(decoder, "embed")
        if decoder.head is not None:
            train_whole(decoder, "head")
    if kind == "rows":
        for name in ("embed",) if decoder.head is None else ("embed", "head"):
            train_rows(decoder, name, torch.tensor(ROWS))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in decoder.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_peft_computes_with_ours(shape: str, kind: str, tmp_path: Path) -> None:
    base = make(shape, tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    untuned = ours(decoder, prompt(40))
    put(decoder, kind, ("q", "v", "down"))
    tuned = ours(decoder, prompt(40))
    assert differ(tuned, untuned) > 0.05
    peft_format.save(decoder, tmp_path / "adapter", base="base")
    peer = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert differ(theirs(peer, prompt(40)) + forgotten(base, kind), tuned) <= 3e-4

    back = load_decoder(tmp_path / "base", torch.float32)
    # of a packed matrix, the parts that were not tuned may come back with what changes nothing
    assert peft_format.load(back, tmp_path / "adapter").keys() >= adapters_of(decoder).keys()
    assert differ(ours(back, prompt(40)), tuned) <= 1e-4
    merge_lora(back)
    assert not adapters_of(back)
    assert differ(ours(back, prompt(40)), tuned) <= 3e-4


def forgotten(model: Any, kind: str) -> Any:
    """A head's bias, which peft (0.21) leaves out where some of the head's rows are trained."""
    parameters = model.named_parameters()
    found = [one for name, one in parameters if "lm_head." in name and name.endswith(".bias")]
    return found[0].detach() if found and kind == "rows" else 0


def config_for(kind: str, family: str, base: Any) -> Any:
    modules = MODULES.get(family, ["q_proj", "v_proj", "down_proj"])
    turned = family == "GPT2"
    if kind == "ia3":
        modules = [one for one in modules if "gate_up" not in one]
        last = [one for one in modules if one.split(".")[-1] in LAST]
        return IA3Config(target_modules=modules, feedforward_modules=last, fan_in_fan_out=turned)
    whole = rows = None
    if kind in ("whole", "rows"):
        layers = (base.get_input_embeddings(), base.get_output_embeddings())
        named = {id(module): name for name, module in base.named_modules()}
        names = [named[id(one)].rpartition(".")[2] for one in layers]
        whole = names if kind == "whole" else None
        rows = dict.fromkeys(names, ROWS) if kind == "rows" else None
    return LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=modules,
        rank_pattern={modules[0]: 7},
        fan_in_fan_out=turned,
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        modules_to_save=whole,
        trainable_token_indices=rows,
    )


LAST = ("down_proj", "c_proj", "dense_4h_to_h", "dense_h_to_4h")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_we_compute_with_peft_s(shape: str, kind: str, tmp_path: Path) -> None:
    base = make(shape, tmp_path / "base")
    if kind == "whole" and base.config.tie_word_embeddings:
        pytest.skip("peft unties what it trains whole: see below")
    config = config_for(kind, stem(SHAPES[shape][0]), base)
    peer = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in peer.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    peer.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    untuned = ours(decoder, prompt(40))
    peft_format.load(decoder, tmp_path / "adapter")
    tuned = ours(decoder, prompt(40))
    assert differ(tuned, untuned) > 0.05
    assert differ(tuned, theirs(peer, prompt(40)) + forgotten(peer, kind)) <= 3e-4


def test_an_embedding_that_peft_untied_is_refused(tmp_path: Path) -> None:
    shape = next(name for name in SHAPES if make(name, tmp_path / name).config.tie_word_embeddings)
    base = make(shape, tmp_path / "base")
    config = config_for("whole", stem(SHAPES[shape][0]), base)
    peer = get_peft_model(base, config)
    for module in (peer.get_input_embeddings(), peer.get_output_embeddings()):
        nn.init.normal_(next(p for p in module.parameters() if p.requires_grad))
    peer.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    with pytest.raises(FileError, match="this base has one matrix for both"):
        peft_format.load(decoder, tmp_path / "adapter")
    assert not adapters_of(decoder)
