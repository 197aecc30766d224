"""Four bits a weight on GGUF's Q4_1 grid: 32 neighbours of a row share a scale d and a minimum m.

Shapes: O outputs (rows) · I inputs · G = I / 32 groups of a row

    w ≈ d · code + m      code 0 … 15, d and m float16

`nearest` rounds each group by itself. It is all that a matrix needs which came from a Q4_1 file:
such a matrix lies on a grid, and comes back bit by bit. A tuned matrix lies off it, and rounding
costs quality that grows as models get smaller. `compensated` lets the columns still to be rounded
make good the error of those already rounded, weighted by what the layer's inputs really are (their
second moment): Frantar et al., "GPTQ", 2022 (arXiv:2210.17323), here with one scale and minimum a
group, taken when the group is reached, and columns in their own order (so the file needs no
permutation).

Both return weights that lie on the grid, with codes 0 and 15 in use in every group. So the writer
of the file, which takes a group's least and greatest value, finds exactly this grid again: the
numbers that were checked are the numbers that are served.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
TOP = 15


def grid(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of groups [..., 32] from their least and greatest: float32 [..., 1] each.

    Both are rounded to float16, as the file stores them.
    """
    low = groups.amin(-1, keepdim=True)
    scale = ((groups.amax(-1, keepdim=True) - low) / TOP).half().float()
    return scale, low.half().float()


def snap(values: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The grid's nearest point to each value."""
    codes = ((values - minimum) / scale.clamp_min(1e-12)).round_().clamp_(0, TOP)
    return codes.mul_(scale).add_(minimum)


def nearest(weight: Tensor) -> Tensor:
    """weight [O, I] rounded group by group."""
    groups = weight.float().view(len(weight), -1, GROUP)
    return snap(groups, *grid(groups)).flatten(-2)


def distance(weight: Tensor, rounded: Tensor) -> float:
    """How far the weights moved at most, in steps of their group (0.5: as far as rounding goes)."""
    groups = weight.float().view(len(weight), -1, GROUP)
    scale, _ = grid(groups)
    moved = (rounded.view_as(groups) - groups).abs()
    return float((moved / scale.clamp_min(1e-12)).max())


def compensated(weight: Tensor, spread: Tensor) -> Tensor:
    """weight [O, I] rounded column by column, each column's error made good by those after it.

    spread [I, I]: from `factor`, once for all matrices that read the same inputs.
    """
    rest = weight.float().clone()
    done = torch.empty_like(rest)
    for start in range(0, rest.shape[1], GROUP):
        end = start + GROUP
        block = rest[:, start:end].clone()  # [O, 32]
        scale, minimum = grid(block)
        lowest, highest = block.argmin(1, keepdim=True), block.argmax(1, keepdim=True)
        errors = torch.empty_like(block)
        within = spread[start:end, start:end]
        for column in range(GROUP):
            value = block[:, column : column + 1]
            point = snap(value, scale, minimum)
            # these two hold the grid's ends, however far they have moved since it was taken
            point = torch.where(lowest == column, minimum, point)
            point = torch.where(highest == column, minimum + TOP * scale, point)
            error = (value - point) / within[column, column]
            errors[:, column : column + 1] = error
            done[:, start + column] = point[:, 0]
            block[:, column + 1 :].addmm_(
                error, within[column : column + 1, column + 1 :], alpha=-1
            )
        rest[:, end:].addmm_(errors, spread[start:end, end:], alpha=-1)
    return done


def factor(moment: Tensor, damping: float = 0.01) -> Tensor:
    """U [I, I], upper triangular, UᵀU = (H + λ·mean(diag H)·1)⁻¹, of the inputs' H = XᵀX.

    Row i of U says how an error in column i is best made good by the columns after it.
    """
    diagonal = moment.diagonal().mean()
    damped = moment + damping * diagonal * torch.eye(len(moment))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper
