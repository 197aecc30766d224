"""PEQA: codes of few bits stay, and the scale of each of their blocks is trained.

Shapes: T tokens · O outputs · I inputs · B = I / 32 blocks of a row

    W = f ⊙ W₀      f [O, B], of each block of 32; W₀ = scale · (code − zero), frozen

f starts at one. What is learnt is in the end another scale (and with it another minimum) of each
block, so the tuned matrix is kept just as the base is: in the same bits, and nothing is lost by
merging. The paper moves the scales themselves; a factor moves each by a share of itself, so that one
rate suits all of them. Kim et al., "PEQA", 2023 (arXiv:2305.14152).

A file has scales of 16 bits. So the product uses f rounded to what the file can say, while f itself
moves in float32 and the gradient looks through the rounding: what is trained is what is served. The
gradient of f is that of W times W₀, summed over each block; so a step costs what full tuning costs,
and its memory is that of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from herdbook.model.layers import BLOCK, Int4Linear, Int8Linear
from herdbook.model.lora import Adapter, matrices, replace

FewBits = Int4Linear | Int8Linear


class PEQALinear(Adapter):
    """A frozen layer of 4 or 8 bits, and the trained factor of each block: [O, B].

    minima: the file keeps a block's minimum apart, in float16 (a GGUF). Otherwise it is so many whole
    steps below zero (compressed-tensors), and remains so.
    """

    def __init__(self, base: FewBits, minima: bool) -> None:
        super().__init__()
        self.base, self.minima = base, minima
        base.requires_grad_(False)
        self.outputs, self.inputs, self.dtype = base.outputs, base.inputs, base.dtype
        self.factor = nn.Parameter(torch.ones_like(scale_of(base)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O]"""
        if self.bypassed:
            y: Tensor = self.base(x)
        else:
            y = _Rescaled.apply(x, self.factor, self)  # type: ignore[no-untyped-call]
        return y

    def plain(self, x: Tensor) -> Tensor:
        """The twin: the whole matrix by the formula, its rounding looked through."""
        base: Any = self.base
        smooth = base.dense(torch.float32) * self.factor.repeat_interleave(BLOCK, 1)
        off = (self.dense(torch.float32) - smooth).detach()
        return F.linear(x, (smooth + off).to(x.dtype), base.bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tuned().dense(dtype)

    @torch.no_grad()
    def tuned(self) -> FewBits:
        """A layer with the base's codes and what their scales are now."""
        base = self.base
        assert isinstance(base, FewBits)
        scale = scale_of(base)
        narrow = _exact(scale)
        found = _rounded(scale * self.factor, narrow)
        if isinstance(base, Int8Linear):
            return rescaled(base, found, None)
        if self.minima:
            return rescaled(base, found, _rounded(base.minimum.float() * self.factor, True))
        zero = (-base.minimum.float() / torch.where(scale == 0, 1.0, scale)).round()
        return rescaled(base, found, -zero * found)

    def merge(self) -> nn.Module:
        """The base's codes with the scales that were trained: exactly what was trained."""
        return self.tuned()


class RescaledLinear(Adapter):
    """A layer of few bits, and the one with its codes and other scales that is in force: PEQA learnt."""

    def __init__(self, base: FewBits, tuned: FewBits) -> None:
        super().__init__()
        self.base, self.tuned = base, tuned
        self.outputs, self.inputs = base.outputs, base.inputs

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O]"""
        y: Tensor = (self.base if self.bypassed else self.tuned)(x)
        return y

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tuned.dense(dtype)

    def merge(self) -> nn.Module:
        return self.tuned


def scale_of(layer: FewBits) -> Tensor:
    """float32 [O, B]"""
    return (layer.scale if isinstance(layer, Int4Linear) else layer.scale[..., 0]).float()


def rescaled(layer: FewBits, scale: Tensor, minimum: Tensor | None) -> FewBits:
    """The layer with other scales [O, B] (and minima, of 4 bits); the codes are shared."""
    if isinstance(layer, Int8Linear):
        return Int8Linear(layer.codes, scale.float(), layer.bias, layer.dtype)
    assert minimum is not None
    if _exact(scale) and _exact(minimum):
        scale, minimum = scale.half(), minimum.half()
    else:
        scale, minimum = scale.float(), minimum.float()
    made = Int4Linear(layer.codes, scale, minimum, layer.bias, layer.dtype)
    made.has_kernel = layer.has_kernel
    return made


def _exact(values: Tensor) -> bool:
    """Whether float16 holds them."""
    return torch.equal(values.half().float(), values.float())


def _rounded(values: Tensor, narrow: bool) -> Tensor:
    return values.half().float() if narrow else values


class _Rescaled(torch.autograd.Function):
    """Neither the tuned matrix nor the base's outlives its product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, layer: PEQALinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        base: Any = layer.base
        return F.linear(x, layer.dense(x.dtype), base.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (above,), (x,), layer = grads, ctx.saved_tensors, ctx.layer
        grad_x = above @ layer.dense(above.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        whole = (above.flatten(0, -2).T @ x.flatten(0, -2)).float()  # of W, [O, I]
        whole.mul_(layer.base.dense(torch.float32))
        return grad_x, whole.view(layer.outputs, -1, BLOCK).sum(-1), None


def apply_peqa(
    decoder: nn.Module, *, targets: Iterable[str], minima: bool, last_layers: int = 0
) -> dict[str, PEQALinear]:
    """Freeze the decoder and put factors on `targets`, of those that are kept in few bits, in so many
    of the last blocks (0: all)."""
    decoder.requires_grad_(False)
    names = matrices(decoder, targets, last_layers)
    few = [name for name in names if isinstance(decoder.get_submodule(name), FewBits)]
    made: dict[str, PEQALinear] = {}
    for name in few:
        layer: Any = decoder.get_submodule(name)
        made[name] = PEQALinear(layer, minima)
        replace(decoder, name, made[name])
    return made
