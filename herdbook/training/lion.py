"""Lion: AdamW's half in memory, one moment, and steps whose every entry is the rate or its negative.

    c = β₁ m + (1 − β₁) g        w ← w − η (sign c + λ w)        m ← β₂ m + (1 − β₂) g

Its authors take a rate 3 to 10 times smaller than AdamW's, a decay as much larger, and betas 0.9, 0.99.
Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023 (arXiv:2302.06675).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """State of a weight: its moment, float32."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in (one for one in group["params"] if one.grad is not None):
                state = self.state[weight]
                if not state:
                    state["moment"] = torch.zeros_like(weight)
                moment = state["moment"]
                way = torch.lerp(weight.grad, moment, first).sign_()
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(way, alpha=-group["lr"])
                moment.lerp_(weight.grad, 1 - second)
