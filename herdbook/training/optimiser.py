"""Optimisers, the learning rate's path, clipping, and the running average of weights.

    rate
    peak ┤   ╭──╮            linear up over the warm-up, then one of
         │  ╱    ╲           cosine    half a cosine wave down to `floor` · peak
         │ ╱      ╲___       linear    a straight line down to `floor` · peak
         └╱───────────→ step constant  stays

The published recipes: Stanford Alpaca and Vicuna "cosine", warm-up 0.03, floor 0; LLaMA "cosine",
2,000 warm-up steps, floor 0.1; Firefly "constant", 100 warm-up steps.

Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235) keeps of a matrix's second moment its rows' and
columns' sums alone and no first moment. Its rate is a share of the matrix's own root mean square (at
least 0.001), and never above 1 / √step: the paper's is 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from herdbook.errors import ConfigError, nearest
from herdbook.training.adamw8 import AdamW8
from herdbook.training.lion import Lion
from herdbook.training.offload import Offload
from herdbook.training.parallel import local

Groups = list[dict[str, Any]]

SCHEDULES = ("constant", "cosine", "linear")


def check_schedule(name: str) -> None:
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r}", rule="is not known", next=nearest(name, SCHEDULES))


def warmup_steps(total: int, *, ratio: float, steps: int) -> int:
    """Steps of warm-up: `steps` where given, else the ratio of all, rounded up."""
    return min(total, steps or math.ceil(total * ratio))


def rate(step: int, total: int, *, schedule: str, warmup: int, floor: float) -> float:
    """Share of the peak rate at a step counted from 0.

    The warm-up counts from 1: transformers begins with a step of rate 0, which moves nothing.

    >>> [round(rate(s, 6, schedule="linear", warmup=2, floor=0.0), 2) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    way = (step - warmup) / max(1, total - warmup)  # 0 at the peak, → 1
    left = 1 - way if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * way))
    return floor + (1 - floor) * left


def make(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimiser of that name over named parameters; vectors (norms, biases) do not decay."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": some, "weight_decay": decay}
        for some, decay in ((matrices, weight_decay), (vectors, 0.0))
        if some
    ]
    return OPTIMISERS[name](groups, learning_rate, betas)


def _adamw(groups: Groups, rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """fused: one pass over the memory instead of a dozen; elementwise, so the same bits every time."""
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=1e-8, fused=True)


def _adafactor(groups: Groups, rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """The first epsilon is squared where it is used: 1e-30, the paper's."""
    return torch.optim.Adafactor(groups, lr=rate, eps=(1e-15, 1e-3))


#: bytes beside a weight: 8 · 2.03 · 4 · almost none
OPTIMISERS: dict[str, Callable[[Groups, float, tuple[float, float]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8": AdamW8,
    "lion": Lion,
    "adafactor": _adafactor,
}


@torch.no_grad()
def average(optimiser: torch.optim.Optimizer, decay: float, offload: Offload | None = None) -> None:
    """Let each weight's running average, float32, follow it: a ← decay · a + (1 − decay) · w.

    It lies in the weight's state and begins as what the weight is after its first step.
    """
    for weight, state in optimiser.state.items():
        if "average" not in state:
            state["average"] = weight.detach().float().clone()
        else:
            state["average"].lerp_(weight.detach().float(), 1 - decay)
        if offload is not None:
            offload.keep(state)


@torch.no_grad()
def take_average(optimiser: torch.optim.Optimizer) -> None:
    """Make every weight its running average."""
    for weight, state in optimiser.state.items():
        weight.copy_(state["average"])


def clip(
    parameters: Iterable[nn.Parameter],
    limit: float,
    total: Callable[[list[Tensor]], Tensor] = torch.nn.utils.get_total_norm,
) -> float:
    """Scale all gradients to a joint norm of at most `limit` (0: leave them); the norm before.

    total: gives the norm, where each process has but a share of the gradients.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = total(grads)
    if limit:
        factor = limit / (norm + 1e-6)
        if factor < 1:
            torch._foreach_mul_([local(grad) for grad in grads], factor)
    return float(norm)
