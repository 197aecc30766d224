"""Each optimiser against its paper's formulas; the running average; weights of bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import PLAN, rows, run, toy, whole

from herdbook.model import blockwise
from herdbook.training import adamw8, loop, optimiser
from herdbook.training.adamw8 import AdamW8
from herdbook.training.moved import Moved, stochastic
from herdbook.training.objective import NextToken

RATE, DECAY, BETAS = 0.01, 0.1, (0.9, 0.99)


def gradients(steps: int, *shape: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (-3 * torch.rand(shape, generator=generator))
    for _ in range(steps):
        yield torch.randn(shape, generator=generator) * sizes


def moved_by(name: str, steps: int, *shape: int) -> tuple[torch.nn.Parameter, Any]:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))
    made = optimiser.make(name, {"w": weight}, learning_rate=RATE, betas=BETAS, weight_decay=DECAY)
    for weight.grad in gradients(steps, *shape):
        made.step()
    return weight, made


def start(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


def test_lion():
    """arXiv 2302.06675, algorithm 2."""
    w, m = start(6, 5), torch.zeros(6, 5)
    for g in gradients(20, 6, 5):
        c = BETAS[0] * m + (1 - BETAS[0]) * g
        w = w - RATE * (c.sign() + DECAY * w)
        m = BETAS[1] * m + (1 - BETAS[1]) * g
    weight, made = moved_by("lion", 20, 6, 5)
    torch.testing.assert_close(weight.detach(), w)
    torch.testing.assert_close(made.state[weight]["moment"], m)


@pytest.mark.parametrize("shape", [(6, 5), (7,)])
def test_adafactor(shape: tuple[int, ...]):
    """arXiv 1804.04235, algorithms 4 and 5, with a decay of the weights as AdamW has it."""

    def rms(x: torch.Tensor) -> float:
        return float(x.square().mean().sqrt())

    w, rows_, columns, v = start(*shape), 0.0, 0.0, 0.0
    for t, g in enumerate(gradients(20, *shape), 1):
        beta = 1 - t**-0.8
        squared = g.square() + 1e-30
        if len(shape) == 2:
            rows_ = beta * rows_ + (1 - beta) * squared.sum(1)
            columns = beta * columns + (1 - beta) * squared.sum(0)
            v = torch.outer(rows_, columns) / rows_.sum()
        else:
            v = beta * v + (1 - beta) * squared
        u = g / v.sqrt()
        u = u / max(1.0, rms(u))
        step = max(1e-3, rms(w)) * min(RATE, t**-0.5)
        w = w * (1 - RATE * DECAY * (len(shape) == 2)) - step * u
    weight, _ = moved_by("adafactor", 20, *shape)
    torch.testing.assert_close(weight.detach(), w, rtol=1e-5, atol=1e-6)


def test_adafactor_bears_a_gradient_of_zeros():
    """LoRA's A has such a one in its first step, as B is zero."""
    weight = torch.nn.Parameter(torch.ones(3, 4))
    made = optimiser.make(
        "adafactor", {"w": weight}, learning_rate=RATE, betas=BETAS, weight_decay=0.0
    )
    weight.grad = torch.zeros(3, 4)
    made.step()
    assert torch.equal(weight, torch.ones(3, 4))


def test_adamw8_of_few_numbers_is_adamw():
    eight, one = moved_by("adamw8", 20, 40, 50), moved_by("adamw", 20, 40, 50)
    torch.testing.assert_close(eight[0], one[0])
    assert eight[1].state[eight[0]]["root"].dtype == torch.float32


def test_adamw8_is_near_adamw_and_its_moments_are_bytes(monkeypatch: pytest.MonkeyPatch):
    """After 30 steps 7 % of the way from where AdamW is, with gradients of three decades in each block
    (with the second moment itself in 8 bits: farther than the way); cut in strips the same."""
    eight, made = moved_by("adamw8", 30, 90, 200)
    one, _ = moved_by("adamw", 30, 90, 200)
    way = (one.detach() - start(90, 200)).norm()
    assert 0 < (eight - one).detach().norm() < 0.08 * way
    held = sum(x.nbytes for x in made.state[eight].values())
    assert held / eight.numel() == pytest.approx(2.03, abs=0.01)
    monkeypatch.setattr(adamw8, "STRIP", 1024)
    assert torch.equal(moved_by("adamw8", 30, 90, 200)[0], eight)


def test_adamw8_s_moments_are_half_a_level_off_at_most_after_a_step():
    weight, made = moved_by("adamw8", 1, 90, 200)
    state = made.state[weight]
    (gradient,) = gradients(1, 90, 200)
    for name, signed, wanted, top in (
        ("first", True, (1 - BETAS[0]) * gradient.flatten(), 0.9 / 64),
        ("root", False, (1 - BETAS[1]) ** 0.5 * gradient.abs().flatten(), 0.9 / 128),
    ):
        scale = state[f"{name}_scale"]
        found = blockwise.decode(state[name], scale, signed)
        bound = scale.repeat_interleave(256)[: len(found)] * (top / 2 + 1e-6)
        assert ((found - wanted).abs() <= bound).all()


def test_a_gradient_far_below_its_block_s_largest_makes_no_leap():
    """Of it nothing but the first moment would be left, had the second not been kept as its root."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    made = AdamW8([{"params": [weight]}], lr=1.0, betas=(0.9, 0.999))
    for step in range(10):
        weight.grad = torch.full((4096,), 1e-5)
        weight.grad[::256] = 1.0
        if step > 4:
            weight.grad[1::256] = 0.0
        before = weight.detach().clone()
        made.step()
        assert (weight - before).abs().max() < 1.5


@pytest.mark.parametrize("name", optimiser.OPTIMISERS)
def test_each_learns(name: str, tmp_path: Path):
    rate = {"lion": 1e-3, "adafactor": 3e-2}.get(name, 1e-2)
    plan = replace(PLAN, optimiser=name, steps=25, learning_rate=rate)
    for full in (False, True):
        _, losses = run(plan, tmp_path / str(full), full=full, data=rows(8))
        assert losses[-1] < (0.7 if full else 0.995) * losses[0]


def test_the_average_is_the_result(tmp_path: Path):
    """Begun as the weights after the first step, then 0.7 of itself and 0.3 of each later one's."""
    wanted: dict[str, torch.Tensor] = {}
    for steps in range(1, 6):
        weights, _ = run(replace(PLAN, steps=steps), tmp_path / str(steps), full=True)
        for name, one in weights.items():
            seen = one.detach()
            wanted[name] = 0.7 * wanted[name] + 0.3 * seen if name in wanted else seen.clone()
    weights, _ = run(replace(PLAN, average=0.7), tmp_path / "average", full=True)
    for name, one in weights.items():
        torch.testing.assert_close(one.detach(), wanted[name])


def test_stochastic_rounding():
    exact = torch.tensor([0.0, 1.0, -1.5, 2.0**-100, 3.0e38]).bfloat16().float()
    assert torch.equal(stochastic(exact).float(), exact)
    torch.manual_seed(0)
    for value in (1.0 + 2**-10, -(1.0 + 2**-10), 1e-3, 0.3):
        found = stochastic(torch.full((100_000,), value)).float()
        assert len(found.unique()) == 2, "one of the two neighbours"
        apart = float(found.max() - found.min())
        assert found.min() < value < found.max() and apart <= abs(value) / 127
        assert float(found.mean()) == pytest.approx(value, abs=apart / 100)


def test_small_steps_move_bfloat16_on_average():
    """A thousandth of what lies between two numbers each: rounded to the nearest, none would move."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(20_000).bfloat16())
    moved = Moved({"w": weight}, "bfloat16")
    sgd = torch.optim.SGD(moved.weights.values(), lr=1.0)
    for _ in range(100):
        weight.grad = torch.full((20_000,), 2**-7 / 1000)
        moved.step(sgd)
    assert weight.dtype == torch.bfloat16 and weight.grad is None
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 0.1 * 2**-7, abs=1e-4)


def test_mixed_is_a_float32_twin_that_is_moved_and_a_rounding_that_computes(tmp_path: Path):
    plan = replace(PLAN, precision="mixed", schedule="constant", clip=0.0, pack=1000)
    weights, losses = run(plan, tmp_path, full=True)
    twins = {name: one.detach().clone() for name, one in whole(toy()).items()}
    wanted = []
    parameters = {name: torch.nn.Parameter(one.clone()) for name, one in twins.items()}
    adamw = optimiser.make(
        "adamw", parameters, learning_rate=1e-2, betas=(0.9, 0.999), weight_decay=0.01
    )
    for cut in loop.batches(plan, len(rows())):
        decoder = toy().bfloat16()
        model = whole(decoder)
        with torch.no_grad():
            for name, one in model.items():
                one.copy_(parameters[name])
        objective = NextToken(decoder)
        (pack,) = objective.packs([rows()[n] for n in cut], 1000)
        loss = objective.loss(pack) / objective.weight(pack)
        loss.backward()
        wanted.append(loss.item())
        for name, one in model.items():
            parameters[name].grad = one.grad.float()
        adamw.step()
    assert losses == pytest.approx(wanted, rel=1e-3)
    for name, one in weights.items():
        assert one.dtype == torch.float32
        way = (parameters[name] - twins[name]).detach().norm()
        assert (one - parameters[name]).detach().norm() < 0.03 * way


def test_packs_add_up_in_float32():
    """bfloat16 would stop at 0.25, where a thousandth is less than half of what lies between two."""
    weight = torch.nn.Parameter(torch.ones(8).bfloat16())
    Moved({"w": weight}, "bfloat16")
    for _ in range(1000):
        (weight.sum() * 1e-3).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, torch.full((8,), 1.0), atol=5e-3, rtol=0)


@pytest.mark.parametrize("full", [False, True])
def test_recomputing_changes_nothing_but_memory(full: bool, tmp_path: Path):
    plain, losses = run(PLAN, tmp_path / "kept", full=full)
    kept: list[int] = []

    def bytes_kept(recompute: bool) -> int:
        decoder = toy()
        whole(decoder.train())
        decoder.recompute = recompute
        kept.clear()
        (pack,) = NextToken(decoder).packs(rows(), 1000)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
            NextToken(decoder).loss(pack)
        return sum(kept)

    def note(one: torch.Tensor) -> torch.Tensor:
        kept.append(one.nbytes)
        return one

    assert bytes_kept(True) < 0.3 * bytes_kept(False)
    again, others = run(PLAN, tmp_path / "again", full=full, recompute=True)
    assert others == losses
    for name, one in again.items():
        assert torch.equal(one, plain[name])
