"""The loop: golden losses, weights by tokens, documents apart, the same order every time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.errors import ConfigError, DataError
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.lora import apply_lora
from herdbook.tokens.chat import Rendering
from herdbook.tokens.packing import pack
from herdbook.training import loop, optimiser
from herdbook.training.loop import Plan
from herdbook.training.objective import Anchor, AnchorPack, NextToken

GOLDEN = Path(__file__).parents[1] / "golden" / "toy_losses.json"
PLAN = Plan(
    batch=8,
    epochs=1,
    steps=5,
    pack=64,
    learning_rate=1e-2,
    schedule="constant",
    floor=0.0,
    warmup_ratio=0.0,
    warmup_steps=0,
    weight_decay=0.01,
    betas=(0.9, 0.999),
    clip=1.0,
    optimiser="adamw",
    average=0.0,
    precision="float32",
    seed=0,
    save_every=100,
)


def toy() -> Decoder:
    """Two layers, their weights written by a formula, so that no random generator matters."""
    decoder = Decoder(
        DecoderConfig(
            vocab=96, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, max_pos=128,
            tied=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        for number, parameter in enumerate(decoder.parameters()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + number)
            parameter.copy_(
                (1 + 0.1 * wave if parameter.ndim == 1 else 0.2 * wave).view_as(parameter)
            )
    return decoder


def rows(count: int = 24) -> list[Rendering]:
    """Documents of 4 to 20 tokens; the last half of each is trained."""
    sizes = [4 + (7 * n) % 17 for n in range(count)]
    return [
        Rendering(
            [(5 * n + 3 * k * k) % 96 for k in range(size)], [k >= size // 2 for k in range(size)]
        )
        for n, size in enumerate(sizes)
    ]


def adapted(decoder: Decoder) -> dict[str, torch.nn.Parameter]:
    decoder.train()
    adapters = apply_lora(decoder, targets=("q", "v", "down"), rank=4, alpha=8)
    return {f"{n}.{m}": getattr(a, m) for n, a in adapters.items() for m in ("A", "B")}


def whole(decoder: Decoder) -> dict[str, torch.nn.Parameter]:
    return dict(decoder.requires_grad_(True).named_parameters())


def run(
    plan: Plan,
    work: Path,
    full: bool = False,
    data: list[Rendering] | None = None,
    recompute: bool = False,
):
    decoder = toy()
    decoder.recompute = recompute
    parameters = whole(decoder) if full else adapted(decoder)
    state = loop.train(NextToken(decoder), parameters, data or rows(), plan, work)
    return parameters, [record["loss"] for record in state.records]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_golden_losses(method: str, tmp_path: Path):
    """A refactor leaves them as they are, or says why not. Write them anew by deleting the file."""
    _, losses = run(PLAN, tmp_path, full=method == "full")
    assert len(losses) == 5 and losses[-1] < losses[0]
    golden = json.loads(GOLDEN.read_text())
    assert losses == pytest.approx(golden[method], abs=1e-5)


def test_accumulation_gives_the_same_update(tmp_path: Path):
    """8 rows at once, or in small packs: the weight is the token's, not the pack's."""
    whole, one = run(replace(PLAN, pack=1000, steps=3), tmp_path / "one")
    parts, many = run(replace(PLAN, pack=20, steps=3), tmp_path / "many")
    assert one == pytest.approx(many, rel=1e-5)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def divergence(anchors: list[Anchor], work: Path, learnt: list[Rendering]) -> float:
    """How far the model is from its base on the anchors, after training."""
    decoder = toy()
    parameters = adapted(decoder)
    loop.train(NextToken(decoder), parameters, learnt, PLAN, work)
    objective = NextToken(decoder)
    return sum(float(objective.loss(one).detach()) for one in objective.packs(anchors, 1000))


def test_anchors_hold_the_model_where_its_base_is(tmp_path: Path):
    anchors = [Anchor(row.ids[::-1], row.mask) for row in rows(12)]
    free = divergence(anchors, tmp_path / "free", rows())
    held = divergence(anchors, tmp_path / "held", [*rows(), *anchors])
    assert 0 < held < 0.7 * free
    assert divergence(anchors, tmp_path / "only", list(anchors)) < 1e-4


def test_anchors_are_packed_apart_and_count_every_token():
    objective = NextToken(toy())
    anchors = [Anchor(row.ids, row.mask) for row in rows(3)]
    packs = objective.packs([*rows(3), *anchors], 1000)
    assert [type(one) for one in packs] == [type(packs[0]), AnchorPack]
    assert objective.weight(packs[1]) == sum(len(row.ids) for row in anchors)
    assert objective.weight(packs[0]) == sum(sum(row.mask) for row in rows(3))


def test_packed_loss_is_the_sum_over_single_documents():
    objective = NextToken(toy())
    documents = rows(9)
    (packed,), _ = pack(documents, 1000)
    singles = [pack([row], 1000)[0][0] for row in documents]
    together = float(objective.loss(packed).detach())
    apart = sum(float(objective.loss(one).detach()) for one in singles)
    assert together == pytest.approx(apart, rel=1e-5)
    assert objective.weight(packed) == sum(objective.weight(one) for one in singles)
    assert objective.weight(packed) == sum(sum(row.mask) for row in documents)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_every_row_once_an_epoch_and_the_rest_of_a_run_is_its_end(count, batch, seed, done):
    plan = replace(PLAN, batch=batch, epochs=3, steps=0, seed=seed)
    all_steps = list(loop.batches(plan, count))
    per_epoch = -(-count // batch)
    assert len(all_steps) == 3 * per_epoch == plan.total(count)
    for epoch in range(3):
        seen = [n for cut in all_steps[epoch * per_epoch : (epoch + 1) * per_epoch] for n in cut]
        assert sorted(seen) == list(range(count))
    done = min(done, len(all_steps))
    assert list(loop.batches(plan, count, done)) == all_steps[done:]


def test_weights_that_would_be_lost_stop_the_run(tmp_path: Path):
    decoder = toy()
    parameters = adapted(decoder)
    with torch.no_grad():
        next(iter(parameters.values()))[0, 0] = float("nan")
    with pytest.raises(DataError, match="lower learning_rate"):
        loop.train(NextToken(decoder), parameters, rows(), PLAN, tmp_path)


def test_rates():
    def path(schedule: str, floor: float = 0.0) -> list[float]:
        return [
            optimiser.rate(step, 10, schedule=schedule, warmup=2, floor=floor) for step in range(10)
        ]

    assert path("constant") == [0.5] + [1.0] * 9
    assert path("linear")[:3] == [0.5, 1.0, 1.0] and path("linear")[9] == pytest.approx(1 / 8)
    cosine = path("cosine", floor=0.1)
    assert cosine[2] == 1.0 and cosine[6] == pytest.approx(0.55)
    assert sorted(cosine[2:], reverse=True) == cosine[2:] and cosine[-1] > 0.1
    assert optimiser.warmup_steps(100, ratio=0.03, steps=0) == 3
    assert optimiser.warmup_steps(100, ratio=0.03, steps=7) == 7
    assert optimiser.warmup_steps(4, ratio=0.03, steps=7) == 4
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        optimiser.check_schedule("cosin")


def test_clipping():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert optimiser.clip([parameter], 0.0) == 5.0
    assert parameter.grad.norm() == 5.0
    assert optimiser.clip([parameter], 1.0) == 5.0
    assert float(parameter.grad.norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("name", optimiser.OPTIMISERS)
def test_only_matrices_decay(name: str):
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    made = optimiser.make(
        name, {"m": matrix, "v": vector}, learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.5
    )
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    made.step()
    assert torch.allclose(matrix, torch.tensor(0.95)) and torch.equal(vector, torch.ones(2))
