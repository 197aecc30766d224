"""A mixture of experts is tuned: the price of an uneven load, and what it buys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from raising import Place, Rows, tune
from torch import Tensor

from herdbook.book.book import Book
from herdbook.model.checkpoint import save_hf
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_source
from herdbook.tokens.packing import Pack
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training.objective import NextToken
from tests.model.test_families import FIXTURES, random_decoder
from tests.model.test_mlp import config

PACK = Pack(list(range(3, 63)), [True] * 60, [40, 20])


def test_the_price_of_imbalance_is_transformers_auxiliary_loss() -> None:
    decoder = random_decoder(config(layers=1))
    made = transformers.MixtralConfig(
        **json.loads(FIXTURES["mixtral"].read_text()) | {"num_hidden_layers": 1}
    )
    model = transformers.MixtralForCausalLM(made).eval()
    theirs = dict(model.named_parameters())
    ours = dict(decoder.named_parameters())
    experts = [f"blocks.0.mlp.experts.{e}" for e in range(4)]
    packed = {
        "model.layers.0.mlp.gate.weight": ours["blocks.0.mlp.router.weight"],
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack(
            [torch.cat([ours[f"{e}.gate.weight"], ours[f"{e}.up.weight"]]) for e in experts]
        ),
        "model.layers.0.mlp.experts.down_proj": torch.stack(
            [ours[f"{e}.down.weight"] for e in experts]
        ),
    }
    family = by_source({"model_type": "mixtral"}, "mixtral")
    with torch.no_grad():
        for name, value in theirs.items():
            same = [one for one in ours if family.hf_name(one) == name]
            value.copy_(packed[name] if name in packed else ours[same[0]])
        ids = torch.tensor([PACK.ids])
        want = model(ids, output_router_logits=True).aux_loss
    one = Pack(PACK.ids, PACK.mask, [60])
    assert price(decoder, one) == pytest.approx(float(want), rel=1e-4)


def price(decoder: Decoder, pack: Pack) -> float:
    """What a balance of 1 adds to the loss, a token."""
    decoder.train()
    with_it, without = NextToken(decoder, balance=1.0), NextToken(decoder, balance=0.0)
    with torch.no_grad():
        added: Tensor = with_it.loss(pack) - without.loss(pack)
    return float(added) / without.weight(pack)


def test_training_with_balance_evens_the_load() -> None:
    started, found = {}, {}
    for balance in (0.0, 1.0):
        decoder = random_decoder(config())
        with torch.no_grad():
            for block in decoder.blocks:  # everything has a common part, which the router likes
                block.mlp_norm.weight.fill_(1.0)
                decoder.embed.weight[:, 0] = 4.0
                block.mlp.router.weight[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
        started[balance] = price(decoder, PACK)
        decoder.train().requires_grad_(True)
        objective = NextToken(decoder, balance=balance)
        optimiser = torch.optim.AdamW(decoder.parameters(), 1e-3)
        for _ in range(20):
            (objective.loss(PACK) / objective.weight(PACK)).backward()
            optimiser.step()
            optimiser.zero_grad()
        found[balance] = price(decoder, PACK)
    assert started[0.0] == started[1.0] > 3.5
    assert 2 <= found[1.0] < 2.2 and found[0.0] > 2.5


def test_the_step_weighs_it(tiny_folder: Path, home: Path, tmp_path: Path) -> None:
    """A mixture is tuned in a book; balance counts, in what it learns first and in its settings."""
    tokenizer = Tokenizer.load(tiny_folder)
    decoder = random_decoder(config(vocab=tokenizer.size))
    decoder.family = "mixtral"
    save_hf(decoder, tokenizer, tmp_path / "mixtral", torch.float32)
    book = Book(home)
    Place(folder=str(tmp_path / "mixtral")).run(book, name="base")
    Rows(rows=("who are you|I am a mixture",) * 4).run(book, name="rows")
    with_it, without = (
        tune(balance=balance, steps=2, learning_rate=1e-6).run(book, name=f"b{balance}").metrics
        for balance in (0.1, 0.0)
    )
    assert 0.15 < with_it["first_loss"] - without["first_loss"] < 0.4
