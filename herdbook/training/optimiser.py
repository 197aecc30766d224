"""AdamW, the learning rate's path, and clipping.

    rate
    peak ┤   ╭──╮            linear up over the warm-up, then one of
         │  ╱    ╲           cosine    half a cosine wave down to `floor` · peak
         │ ╱      ╲___       linear    a straight line down to `floor` · peak
         └╱───────────→ step constant  stays

The published recipes: Stanford Alpaca and Vicuna "cosine", warm-up 0.03, floor 0; LLaMA "cosine",
2,000 warm-up steps, floor 0.1; Firefly "constant", 100 warm-up steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from herdbook.errors import ConfigError, nearest

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


def adamw(
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW over named parameters; vectors (norms, biases) do not decay.

    fused: one pass over the memory instead of a dozen; elementwise, so the same bits every time.
    """
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": some, "weight_decay": decay}
        for some, decay in ((matrices, weight_decay), (vectors, 0.0))
        if some
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=True)


def clip(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale all gradients to a joint norm of at most `limit` (0: leave them); the norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if limit:
        factor = limit / (norm + 1e-6)
        if factor < 1:
            torch._foreach_mul_(grads, factor)
    return float(norm)
