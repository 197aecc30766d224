"""Every family is tuned: adapters train, merge, and come back from peft's layout; 4 and 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from herdbook.compression.quantise import round_to_q4_1
from herdbook.errors import FamilyError, FileError
from herdbook.model.checkpoint import load_decoder, save_gguf, save_hf
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.layers import Linear
from herdbook.model.layout import Packed
from herdbook.model.lora import TARGETS, adapters_of, apply_lora, merge_lora
from herdbook.model.nf4 import NF4Linear
from herdbook.tokens.packing import Pack
from herdbook.training import peft_format
from herdbook.training.objective import NextToken
from tests.model.test_families import FIXTURES, of_fixture

LENGTHS = [13, 7, 13]


#: those that the one decoder computes; the modules of their own are tuned in test_modules.py
DECODERS = [name for name in FIXTURES if type(of_fixture(name)[1]) is DecoderConfig]


@pytest.fixture(params=DECODERS)
def decoder(request: Any) -> Decoder:
    family, config = of_fixture(request.param)
    decoder = Decoder(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(float("norm" in name and "bias" not in name), 0.2)
    decoder.family = family.name
    return decoder.eval()


def ids_of(decoder: Decoder) -> list[int]:
    """Three documents; in a prefix model each has a context."""
    ids = torch.randint(
        3, 110, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)
    ).tolist()
    if marks := decoder.config.prefix:
        for start in (0, 13, 20):
            ids[start + 3 : start + 5] = [marks.whole, marks.start]
    return list(ids)


@torch.no_grad()
def logits(decoder: Decoder) -> torch.Tensor:
    ids = torch.tensor(ids_of(decoder))
    return decoder.eval().logits(decoder(ids, Packed(LENGTHS)))


def test_adapters_train_and_merge(decoder: Decoder, tmp_path: Path) -> None:
    untuned = logits(decoder)
    adapters = apply_lora(decoder, targets=TARGETS, rank=4, alpha=8)
    assert torch.equal(logits(decoder), untuned) or (logits(decoder) - untuned).abs().max() < 1e-5
    objective = NextToken(decoder.train())
    pack = Pack(ids_of(decoder), [True] * sum(LENGTHS), LENGTHS)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(adapters)
    optimiser = torch.optim.AdamW(parameters, 1e-2)
    losses = []
    for _ in range(12):
        loss = objective.loss(pack) / objective.weight(pack)
        loss.backward()
        assert all(p.grad is not None for p in parameters), "every adapter is reached"
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    tuned = logits(decoder)
    peft_format.save(decoder, tmp_path, base="base")
    merge_lora(decoder)
    assert not adapters_of(decoder)
    torch.testing.assert_close(logits(decoder), tuned, atol=1e-3, rtol=1e-3)


def test_recomputed_blocks_give_the_same_gradients(decoder: Decoder) -> None:
    gradients = []
    pack = Pack(ids_of(decoder), [True] * sum(LENGTHS), LENGTHS)
    decoder.requires_grad_(True).train()
    for decoder.recompute in (False, True):
        decoder.zero_grad()
        NextToken(decoder, balance=0.1).loss(pack).backward()
        gradients.append({n: p.grad for n, p in decoder.named_parameters() if p.grad is not None})
    for name, one in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], one, msg=name)


def test_adapters_train_beside_nf4(decoder: Decoder, tmp_path: Path) -> None:
    """Every matrix of a block is rounded but routers; loss and gradients are the dense twin's."""
    save_hf(decoder, None, tmp_path, torch.float32)
    pack = Pack(ids_of(decoder), [True] * sum(LENGTHS), LENGTHS)
    found = []
    for nf4 in (True, False):
        one = load_decoder(tmp_path, torch.float32, nf4=nf4)
        if nf4:
            rounded = {n: m for n, m in one.named_modules() if isinstance(m, NF4Linear)}
            left = [n for n, m in one.blocks.named_modules() if isinstance(m, Linear)]
            assert rounded and all(name.endswith("router") for name in left)
        else:
            for name, layer in rounded.items():
                one.get_submodule(name).weight.copy_(layer.plain())
        adapters = apply_lora(one.train(), targets=TARGETS, rank=4, alpha=8)
        loss = NextToken(one).loss(pack)
        loss.backward()
        found.append((loss.item(), {name: a.B.grad for name, a in adapters.items()}))
    (ours, mine), (theirs, wanted) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, one in mine.items():
        torch.testing.assert_close(one, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("targets", [("q", "v"), tuple(TARGETS)])
def test_adapters_come_back_from_peft_s_layout(
    decoder: Decoder, targets: tuple[str, ...], tmp_path: Path
) -> None:
    untuned = logits(decoder)
    adapters = apply_lora(decoder, targets=targets, rank=4, alpha=6)
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    tuned = logits(decoder)
    assert (tuned - untuned).abs().max() > 0.01
    peft_format.save(decoder, tmp_path, base="base")
    for name, adapter in adapters.items():
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, adapter.base)
    back = peft_format.load(decoder, tmp_path)
    assert back.keys() == adapters.keys()
    for name, adapter in back.items():
        assert adapter.rank == 4 and adapter.scale == pytest.approx(adapters[name].scale)
        assert torch.equal(adapter.A, adapters[name].A)
        assert torch.equal(adapter.B, adapters[name].B)
    torch.testing.assert_close(logits(decoder), tuned, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_1"])
def test_bits(decoder: Decoder, quant: str, tmp_path: Path) -> None:
    """Quantised by the calibrated way, kept so in memory, and near; or refused, where GGUF cannot."""
    path = tmp_path / "model.gguf"
    before = logits(decoder)
    try:
        save_gguf(decoder, None, path, "F32")
    except FamilyError as error:
        assert "cannot be written as GGUF" in str(error) and "--to hf" in str(error.next)
        return
    if quant == "Q4_1":
        round_to_q4_1(decoder, [Pack(ids_of(decoder), [True] * sum(LENGTHS), LENGTHS)])
    save_gguf(decoder, None, path, quant)
    dense = load_decoder(path, torch.float32)
    kept = load_decoder(path, torch.float32, quantised=True)
    assert type(kept.blocks[0].attention.q).__name__ in ("Int8Linear", "Int4Linear")
    near = {"Q8_0": 0.1, "Q4_1": 0.6}[quant]
    assert (logits(dense) - before).abs().median() <= near * before.std()  # a router may flip
    rounding = (logits(kept) - logits(dense)).abs().mean()  # the int4 kernel computes in bfloat16
    assert rounding <= 0.05 * before.std()


def test_what_peft_has_no_place_for_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    apply_lora(decoder, targets=("q",), rank=2, alpha=2)
    peft_format.save(decoder, tmp_path, base="base")
    config = json.loads((tmp_path / peft_format.CONFIG).read_text())
    (tmp_path / peft_format.CONFIG).write_text(json.dumps(config | {"rank_pattern": {"a|b": 3}}))
    with pytest.raises(FileError, match=r"rank_pattern is .* but must give ends of modules' names"):
        peft_format.load(decoder, tmp_path)
