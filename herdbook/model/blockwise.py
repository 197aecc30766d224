"""Eight bits a number by blocks: 256 neighbours share a scale, each is one of 256 levels of it.

N numbers, B = ⌈N / 256⌉ blocks.

    number ≈ scale of its block · LEVELS[code]        scale: the block's largest magnitude

The levels are those of Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021
(arXiv:2110.02861): seven decades below 1, each finer than the one below it, so that large numbers
keep two digits and small ones are not lost. Signed, the top decade has 64 levels on each side; for
numbers that are never negative it has 128. Zero and the scale itself are levels, so both are exact.

Used where something slow to move lies beside the weights: an optimiser's moments, NF4's scales.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256


@functools.cache
def levels(signed: bool) -> Tensor:
    """The 256 levels, ascending: float32, on the CPU."""
    found = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        found += middles.tolist()
        found += (-middles).tolist() if signed else []
    return torch.tensor(sorted(found))


@functools.cache
def _on(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The levels; and by a float32's upper 16 bits the least code that such a number has, and from
    where on it has the next: so few numbers share 16 bits that there are no more than these two."""
    values = levels(signed)
    middles = F.pad((values[1:] + values[:-1]) / 2, (0, 1), value=float("inf"))
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    least = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    codes = torch.bucketize(least.nan_to_num(0.0), middles[:-1])
    return (
        values.to(device),
        codes.to(device=device, dtype=torch.uint8),
        middles[codes].to(device),
    )


def encode(numbers: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Any shape → codes uint8 [N] of the nearest levels, scales float32 [B]."""
    flat = numbers.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    shares = (blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).flatten()
    _, codes, borders = _on(signed, flat.device)
    upper = (shares.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    found = codes.index_select(0, upper).add_(shares > borders.index_select(0, upper))
    return found[: len(flat)], scale


def decode(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """codes uint8 [N], scales [B] → float32 [N]."""
    values, _, _ = _on(signed, codes.device)
    shares = F.pad(values.index_select(0, codes.int()), (0, -len(codes) % BLOCK))
    return shares.view(-1, BLOCK).mul_(scale[:, None]).flatten()[: len(codes)]
