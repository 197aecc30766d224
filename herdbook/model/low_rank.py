"""Products with frozen matrices and their low-rank corrections: one or several that read the same.

Shapes: T tokens · I inputs · O outputs of all n matrices · r ranks of all · g inputs of a group

    y = x [W₁ … Wₙ]ᵀ + scale · [x A₁ᵀ B₁ᵀ … x Aₙᵀ Bₙᵀ]

Autograd would not need the frozen W's gradient either, but makes a [T, O] product of its own for the
correction; `_LowRank` adds the correction into the bases' output and saves only x (its sums over
groups [T, I/g] are smaller still) and x Aᵀ [T, r]. Several matrices are one product each way, and so
are their corrections, with B's as blocks of a diagonal. Where the matrices lie side by side in memory
(`side_by_side`) that needs no copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def pooled(x: Tensor, group: int) -> Tensor:
    """x [T, I] summed over groups of neighbours: [T, I / group]."""
    return x if group == 1 else x.unflatten(1, (-1, group)).sum(-1)  # type: ignore[no-untyped-call]


def low_rank(
    x: Tensor,
    bases: Sequence[Any],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scale: float,
    group: int,
    *,
    biased: bool = True,
) -> Tensor:
    """Rows x [T, I] → [T, O], what the linear layers `bases` give with their corrections, end to end."""
    y: Tensor = _LowRank.apply(x, bases, biased, scale, group, *As, *Bs)  # type: ignore[no-untyped-call]
    return y


@torch.no_grad()
def side_by_side(layers: Sequence[Any]) -> None:
    """Lay the weights [O, I] of these layers into one piece of memory."""
    whole = torch.cat([one.weight for one in layers])
    parts = torch.split(whole, [len(one.weight) for one in layers])
    for one, part in zip(layers, parts, strict=True):
        one.weight.data = part


def _weight(bases: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """The frozen matrices [O, I]; of bases in few bits in memory of its own."""
    parts: list[Tensor] = [
        one.dense(dtype) if getattr(one, "weight", None) is None else one.weight for one in bases
    ]
    first, at = parts[0].detach(), parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.data_ptr() != at or not part.is_contiguous():
            return torch.cat(parts)
        at += part.nbytes
    return first.as_strided((sum(len(one) for one in parts), first.shape[1]), first.stride())


def _bias(bases: Sequence[Any]) -> Tensor | None:
    found = [one.bias for one in bases]
    assert len({bias is None for bias in found}) == 1, "all of them have a bias, or none"
    return None if found[0] is None else found[0] if len(found) == 1 else torch.cat(found)


def product(x: Tensor, bases: Sequence[Any]) -> Tensor:
    """Rows x [T, I] → [T, O], what the linear layers give alone, end to end."""
    return F.linear(x, _weight(bases, x.dtype), _bias(bases))


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bases: Sequence[Any],
        biased: bool,
        scale: float,
        group: int,
        *trained: Tensor,
    ) -> Tensor:
        As, Bs = trained[: len(bases)], trained[len(bases) :]
        A: Tensor = torch.cat(As).to(x.dtype)  # [r, I/g]
        B: Tensor = torch.block_diag(*Bs).to(x.dtype)  # type: ignore[no-untyped-call]  # [O, r]
        seen = pooled(x, group)
        down = seen @ A.T  # [T, r]
        y = F.linear(x, _weight(bases, x.dtype), _bias(bases) if biased else None)
        y.addmm_(down, B.T, alpha=scale)
        ctx.save_for_backward(seen, down, A, B)
        ctx.bases, ctx.scale, ctx.group = bases, scale, group
        ctx.shapes = [one.shape for one in Bs]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (above,) = grads  # [T, O]
        seen, down, A, B = ctx.saved_tensors
        outputs, ranks = zip(*ctx.shapes, strict=True)
        grad_down = (above @ B).mul_(ctx.scale)  # [T, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = above @ _weight(ctx.bases, above.dtype)
            if ctx.group == 1:
                grad_x.addmm_(grad_down, A)
            else:
                groups = grad_x.view(len(grad_x), -1, ctx.group)
                groups.add_((grad_down @ A)[..., None])
        grad_A = (grad_down.T @ seen).split(ranks)
        crossed = (down.T @ above).mul_(ctx.scale)  # [r, O]; so `above` is read in order
        rows = zip(crossed.split(ranks), range(len(ranks)), strict=True)
        grad_B = [row.split(outputs, 1)[number].T for row, number in rows]
        return grad_x, None, None, None, None, *grad_A, *grad_B
