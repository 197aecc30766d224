"""DoRA: an adapter that learns a matrix's direction by LoRA, and the length of each row by itself.

Shapes: T tokens · I inputs · O outputs · r rank

    y = m / ‖V‖ · (x Vᵀ) + b        V = W + scale · B A        ‖·‖ of each row, m [O] trained

m starts as ‖W‖, so the first step starts from the loaded model. As in the paper (section 4.3) the
gradient does not go through ‖V‖. Liu et al., "DoRA", 2024 (arXiv:2402.09353).

‖V‖² = ‖W‖² + 2 scale · B·(W Aᵀ) + scale² · B·(B A Aᵀ), row by row, so V [O, I] is never made; and
where nothing is trained any more it is computed once. `DoRALinear.plain` writes V out: it is the twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from herdbook.model.lora import LoRALinear
from herdbook.model.low_rank import low_rank, pooled


class DoRALinear(LoRALinear):
    """A LoRALinear whose rows have lengths of their own: magnitude [O]."""

    def __init__(self, base: nn.Module, *settings: Any) -> None:
        super().__init__(base, *settings)
        self.magnitude = nn.Parameter(self._weight.detach().to(self.A.dtype).norm(dim=1))
        self._squares = self.magnitude.detach() ** 2  # ‖W‖², [O]
        self._norm: Tensor | None = None

    @property
    def _weight(self) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O]"""
        if self.bypassed or (self.training and self.dropout):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        y = low_rank(rows, (self.base,), (self.A,), (self.B,), self.scale, self.group, biased=False)
        y = y * (self.magnitude / self.norm()).to(x.dtype)
        return self._biased(y).view(*x.shape[:-1], -1)

    def plain(self, x: Tensor) -> Tensor:
        whole = self._weight.to(self.A.dtype) + self.scale * (self.B @ self.wide_A())
        norm = whole.norm(dim=1).detach()
        down = F.linear(F.dropout(x, self.dropout, self.training), self.wide_A().to(x.dtype))
        y = F.linear(x, self._weight) + self.scale * F.linear(down, self.B.to(x.dtype))
        return self._biased(y * (self.magnitude / norm).to(x.dtype))

    def _biased(self, y: Tensor) -> Tensor:
        bias = self.base.bias
        return y + bias if isinstance(bias, Tensor) else y

    @torch.no_grad()
    def norm(self) -> Tensor:
        """‖V‖ of each row, [O]."""
        if self._norm is None or self.A.requires_grad:  # a fused optimiser's step leaves no trace
            A, B, weight = self.A, self.B, self._weight
            cross = (pooled(weight, self.group) @ A.T.to(weight.dtype)).to(B.dtype)  # W Aᵀ, [O, r]
            inner = self.group * (A @ A.T)
            own = B * (2 * self.scale * cross + self.scale**2 * (B @ inner))
            self._norm = (self._squares + own.sum(1)).clamp_min(0).sqrt()
        return self._norm

    def merged(self) -> Tensor:
        whole = super().merged()
        share: Tensor = self.magnitude.float() / whole.norm(dim=1)
        return whole * share[:, None]
