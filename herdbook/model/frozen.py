"""The product with a matrix that is kept in few bits, does not learn, and is made anew for each use.

Autograd would keep the dense matrix from the forward to the backward pass: all of a model's at once,
which is what quantising them was to save.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Quantised(Protocol):
    """A layer of few bits: `dense` gives the matrix [out, in] that it stands for."""

    bias: Any

    def dense(self, dtype: torch.dtype) -> Tensor: ...


def frozen_linear(x: Tensor, layer: Quantised) -> Tensor:
    """y = x·Wᵀ + b, x [..., in]; a gradient for x alone, and W in memory only while it multiplies.

    Twin: F.linear(x, layer.dense(x.dtype), layer.bias).
    """
    y: Tensor = _Frozen.apply(x, layer)  # type: ignore[no-untyped-call]
    return y


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantised) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (above,) = grads
        return above @ ctx.layer.dense(above.dtype), None
