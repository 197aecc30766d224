"""Steps between the matrix products, with backward passes that keep and touch less than autograd's.

Shapes: T tokens · H heads · D head_dim · R of them turning · F inner width of the MLP

Composed of single operations, a norm keeps three float32 copies of its input for the way back and a
gate what comes before and behind it. Here the norm keeps its input and a number a row, the gate its two
inputs; the rest is computed again, in strips of rows that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: numbers of a strip (on a CPU; elsewhere all rows are one): what is float32 for the moment stays in the cache
STRIP = 1 << 16

_alike = False


def learns(*tensors: Tensor) -> bool:
    """Whether a gradient goes back to one of these, or they are computed as if it did."""
    return _alike or (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))


@contextmanager
def as_if_learning() -> Iterator[None]:
    """Inside, a pass without gradients goes through the operations of one with them: where nothing was
    learnt, both are equal to the last bit."""
    global _alike
    before, _alike = _alike, True
    try:
        yield
    finally:
        _alike = before


def as_before() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch's checkpoint: what is computed again goes through the operations of the first time."""
    return nullcontext(), as_if_learning() if _alike else nullcontext()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis, computed in weight's type, given in x's.

    Twin: F.rms_norm."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(rows)
        rate = weight.new_empty(len(rows), 1)
        for some in _strips(rows):
            wide = rows[some].to(weight.dtype)
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps), out=rate[some])
            y[some] = (wide * rate[some]).mul_(weight)
        ctx.save_for_backward(x, weight, rate)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rate = ctx.saved_tensors
        rows, above = (t.reshape(-1, x.shape[-1]) for t in (x, grads[0]))
        grad_x = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for some in _strips(rows):
            plain = rows[some].to(weight.dtype) * rate[some]  # of mean square 1
            due = above[some].to(weight.dtype)
            if grad_weight is not None:
                grad_weight += (due * plain).sum(0)
            due = due * weight
            along = torch.linalg.vecdot(due, plain)[:, None].div_(-x.shape[-1])
            grad_x[some] = due.addcmul_(plain, along).mul_(rate[some])
        return grad_x.view(x.shape), grad_weight, None


def _strips(rows: Tensor) -> list[slice]:
    size = max(1, STRIP // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    return [slice(at, at + size) for at in range(0, len(rows), size)]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] of which the first R turn: (a, b) → (a·cos − b·sin, b·cos + a·sin), cos and sin
    [T, 1, R / 2]."""
    y: Tensor = _Turn.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = x[..., :half], x[..., half : 2 * half]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-way)
    torch.mul(b, cos, out=out[..., half : 2 * half]).addcmul_(a, sin, value=way)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def swiglu(*parts: Tensor) -> Tensor:
    """silu(gate) · up: gate and up [T, F], or both end to end [T, 2 F] → [T, F].

    Twin: F.silu(gate) * up."""
    y: Tensor = _SwiGLU.apply(*parts)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        parts, (above,) = ctx.saved_tensors, grads
        found = tuple(torch.empty_like(one) for one in parts)
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
        of_gate, of_up = found if len(found) == 2 else found[0].chunk(2, -1)
        torch.mul(above, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(above * up, gate, grad_input=of_gate)
        return found
