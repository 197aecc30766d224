"""A mixture of experts: grouped by expert as token by token, and how evenly its router spreads them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from herdbook.files import gguf
from herdbook.model.checkpoint import save_gguf
from herdbook.model.config import DecoderConfig
from herdbook.model.families import by_source
from herdbook.model.mlp import Experts
from tests.model.test_families import FIXTURES, random_decoder


def config(**changes: int) -> DecoderConfig:
    source = json.loads(FIXTURES["mixtral"].read_text())
    return dataclasses.replace(by_source(source, "mixtral").config(source, "mixtral"), **changes)


@pytest.mark.parametrize("used", [1, 2, 4])
@torch.no_grad()
def test_expert_by_expert_is_token_by_token(used: int) -> None:
    mixture = random_decoder(config(experts_used=used)).blocks[0].mlp
    assert isinstance(mixture, Experts)
    x = torch.randn(37, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mixture(x), mixture.plain(x), atol=1e-4, rtol=1e-4)
    assert mixture.load is not None and int(mixture.load.sum()) == 37 * used
    assert torch.equal(mixture(x[:0]), x[:0])


def test_a_router_is_never_rounded(tmp_path: Path) -> None:
    decoder = random_decoder(config())
    decoder.family = "mixtral"
    save_gguf(decoder, None, tmp_path / "m.gguf", "Q4_1")
    types = {name: tensor.type for name, tensor in gguf.read(tmp_path / "m.gguf").tensors.items()}
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["blk.0.ffn_gate_exps.weight"] == "Q4_1"


def test_an_even_load_costs_the_number_of_experts_used() -> None:
    """By hand: the router of 4 experts is the identity, and every token likes two of them alike."""
    mixture = random_decoder(config(hidden=4)).blocks[0].mlp
    assert isinstance(mixture, Experts)
    with torch.no_grad():
        mixture.router.weight.copy_(torch.eye(4))
    pairs = [(0, 1), (2, 3), (0, 2), (1, 3)]
    even = torch.zeros(4, 4)
    for row, pair in enumerate(pairs):
        even[row, list(pair)] = 50.0
    mixture.train().requires_grad_(False)
    mixture.route(even)
    assert mixture.imbalance is not None and float(mixture.imbalance) == pytest.approx(2)
    mixture.route(even[:1].repeat(4, 1))  # all to the same two: twice as much
    assert float(mixture.imbalance) == pytest.approx(4)
    assert mixture.load is not None and mixture.load.tolist() == [4, 4, 0, 0]
