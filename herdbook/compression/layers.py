"""A decoder's matrices become quantised layers, each rounded by itself, for the compressed-tensors layout.

Groups of 32 inputs, O rows.

    4 bits   w ≈ scale · (code − zero)   code and zero 0 … 15
    8 bits   w ≈ scale · code            code −127 … 127

The scale of 4 bits is the one of `SHARES` of the group's range, zero included, that leaves the least
squared error: clipping the few outermost weights pays. On normal weights it is as near as Q4_1's free
minimum (7.8 % of the norm; without the search 8.1 %), in 4.625 bits a weight and not 5. Scales have
so few bits that bfloat16 holds them, and float16 the product with a zero point: every reader computes
with the very same weights, in either type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from herdbook.compression.parity import check_rounding
from herdbook.model.checkpoint.compressed import zero_points
from herdbook.model.decoder import Decoder
from herdbook.model.layers import BLOCK, Int4Linear, Int8Linear, Linear

SHARES = tuple(0.7 + 0.04 * step for step in range(9))
#: significant bits of a scale
SCALE_BITS = {4: 7, 8: 8}
#: weights that are rounded at once: they stay in the cache
STRIP = 1 << 16


@dataclass(frozen=True)
class Rounded:
    """What was done to a decoder."""

    matrices: int
    exact: int  # that lay on the grid already, and keep their codes
    share: float  # how far a matrix moved at most, of its norm


@torch.no_grad()
def quantise_layers(decoder: Decoder, bits: int) -> Rounded:
    """Replace every matrix of the blocks whose rows divide into groups by a quantised layer.

    Routers stay: rounded, they send tokens to other experts. GateError where a matrix moved further
    than rounding explains (its weights are not numbers).
    """
    matrices = exact = 0
    worst = 0.0
    for block in decoder.blocks:
        for name, layer in list(block.named_modules()):
            if not isinstance(layer, (Linear, Int4Linear, Int8Linear)) or name.endswith("router"):
                continue
            if layer.inputs % BLOCK:
                continue
            matrices += 1
            if _lies(layer, bits):
                exact += 1
                continue
            made = rounded(layer, bits)
            wanted = layer.dense(torch.float32)
            off = made.dense(torch.float32).sub_(wanted).norm() / wanted.norm().clamp_min(1e-30)
            check_rounding(name, float(off), f"int{bits}")
            worst = max(worst, float(off))
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, made)
    return Rounded(matrices, exact, worst)


def _lies(layer: nn.Module, bits: int) -> bool:
    """Whether a layer is of these bits and on this layout's grid."""
    if bits == 8:
        return isinstance(layer, Int8Linear)
    return isinstance(layer, Int4Linear) and zero_points(layer) is not None


@torch.no_grad()
def rounded(layer: Linear | Int4Linear | Int8Linear, bits: int) -> Int4Linear | Int8Linear:
    """The quantised layer that is nearest to this one."""
    weight = layer.dense(torch.float32)
    rows, count = len(weight), weight.shape[1] // BLOCK
    codes = torch.empty(rows, count, BLOCK, dtype=torch.uint8)
    scale, zero = torch.empty(rows, count, 1), torch.empty(rows, count, 1)
    step = max(1, STRIP // weight.shape[1])
    for first in range(0, rows, step):
        some = slice(first, first + step)
        groups = weight[some].view(-1, count, BLOCK)
        codes[some], scale[some], zero[some] = (four if bits == 4 else eight)(groups)
    scale, zero = scale[..., 0], zero[..., 0]
    bias, dtype = layer.bias, weight.dtype if isinstance(layer, Linear) else layer.dtype
    if bits == 8:
        return Int8Linear((codes ^ 128).view(torch.int8), scale, bias, dtype)
    half = BLOCK // 2
    minimum = -zero * scale
    small = all(torch.equal(one.half().float(), one) for one in (scale, minimum))
    of = torch.float16 if small else torch.float32  # float16 ends at 6e-8
    return Int4Linear(
        codes[..., :half] | codes[..., half:] << 4, scale.to(of), minimum.to(of), bias, dtype
    )


def four(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """groups [n, B, 32] → codes of the same shape, scale and zero [n, B, 1]."""
    low, high = groups.amin(-1, True).clamp_max(0), groups.amax(-1, True).clamp_min(0)
    full = (high - low) / 15
    full = torch.where(full > 0, full, 1.0)  # of nothing but zeros
    zero = (-low / full).round_()
    scale, least = full, torch.full_like(full, float("inf"))
    codes = torch.empty_like(groups)
    for share in SHARES:
        tried = significant(full * share, SCALE_BITS[4])
        found = (groups / tried).add_(zero).round_().clamp_(0, 15)
        error = ((found - zero) * tried).sub_(groups).square_().sum(-1, True)
        better = error < least
        scale, least = torch.where(better, tried, scale), torch.where(better, error, least)
        codes = torch.where(better, found, codes)
    return codes.to(torch.uint8), scale, zero


def eight(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same; codes lie 128 higher, zero is 128."""
    full = groups.abs().amax(-1, True) / 127
    scale = significant(torch.where(full > 0, full, 1.0), SCALE_BITS[8])
    codes = (groups / scale).round_().clamp_(-127, 127).add_(128)
    return codes.to(torch.uint8), scale, torch.full_like(scale, 128)


def significant(values: Tensor, bits: int) -> Tensor:
    """The nearest numbers of so many significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)
