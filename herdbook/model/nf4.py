"""NF4: four bits a weight at the places where a normal distribution has its weights, for QLoRA.

Shapes: O outputs · I inputs · N = ⌈O·I / 64⌉ blocks of 64 weights that lie side by side

    w ≈ scale of its block · LEVELS[code]

Each level stands for an equal share of normally distributed weights, zero is one of them, and so are
−1 and 1, so that a block's largest weight is kept exactly. The scales are rounded to 8 bits in turn
(double quantisation): their mean is taken off, and blocks of 256 share a float32. In all 4.127 bits
a weight. Dettmers et al., "QLoRA", 2023 (arXiv:2305.14314), where the levels are listed; the layout
is bitsandbytes': the first of two weights in a byte's upper half.

It is a form to learn beside, not to serve from: nothing multiplies it, so the matrix is made anew for
every product, forward and backward, and never kept.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from herdbook.model import blockwise
from herdbook.model.frozen import frozen_linear

BLOCK = 64
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
#: blocks made dense at once: what is held besides the result stays in the cache
STRIP = 1 << 12


class NF4Linear(nn.Module):
    """y = x·Wᵀ + b, W [O, I] in NF4 and frozen; only x gets a gradient.

    codes uint8 [N, 32]; of the scales, codes uint8 [N], float32 [⌈N / 256⌉] and their mean.
    """

    codes: Tensor
    scale_codes: Tensor
    scale_scale: Tensor
    scale_mean: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """weight [O, I], of any type, is rounded. dtype: what the layer is computed in."""
        super().__init__()
        self.outputs, self.inputs = weight.shape
        self.dtype = dtype
        flat = weight.detach().float().flatten()
        blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1)
        self.codes = nn.Buffer(_codes(blocks, scale))
        self.scale_mean = nn.Buffer(scale.mean())
        codes, of_them = blockwise.encode(scale - self.scale_mean, signed=True)
        self.scale_codes, self.scale_scale = nn.Buffer(codes), nn.Buffer(of_them)
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)

    def scale(self) -> Tensor:
        """Of each block, float32 [N]."""
        found = blockwise.decode(self.scale_codes, self.scale_scale, signed=True)
        return found.add_(self.scale_mean)

    def plain(self) -> Tensor:
        """The twin of `dense`: the formula, float32 [O, I]."""
        codes = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten(1).long()
        levels = torch.tensor(LEVELS, device=codes.device)[codes]
        whole = (levels * self.scale()[:, None]).flatten()
        return whole[: self.outputs * self.inputs].view(self.outputs, self.inputs)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W in this type: levels and scales are rounded to it first, then their products."""
        if dtype.itemsize > 4:
            return self.plain().to(dtype)
        table = _table(dtype, self.codes.device)
        by = torch.uint16 if dtype.itemsize == 2 else torch.uint8
        scale = self.scale().to(dtype)[:, None]
        out = torch.empty(len(self.codes), BLOCK, dtype=dtype, device=self.codes.device)
        for first in range(0, len(out), STRIP):
            some = slice(first, first + STRIP)
            index = self.codes[some].view(by).int().flatten()
            torch.index_select(table, 0, index, out=out[some].view(torch.int64).flatten())
            out[some].mul_(scale[some])
        return out.flatten()[: self.outputs * self.inputs].view(self.outputs, self.inputs)


def _codes(blocks: Tensor, scale: Tensor) -> Tensor:
    """blocks [N, 64], their scales [N] → the nearest levels, two in a byte: uint8 [N, 32]."""
    levels = torch.tensor(LEVELS, device=blocks.device)
    borders = ((levels[1:] + levels[:-1]) / 2).tolist()
    packed = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=blocks.device)
    for first in range(0, len(blocks), STRIP):
        some = slice(first, first + STRIP)
        divisor = scale[some].clamp_min(torch.finfo(torch.float32).tiny)
        shares = blocks[some] / divisor[:, None]
        codes = torch.zeros_like(shares, dtype=torch.uint8)
        for border in borders:
            codes += shares > border
        packed[some] = codes[:, ::2] << 4 | codes[:, 1::2]
    return packed


@functools.cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """8 bytes of levels, as an int64, for every pair of codes (32-bit types) or four codes (16-bit)."""
    levels = torch.tensor(LEVELS, dtype=dtype)
    one = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)  # [256, 2]
    if dtype.itemsize == 2:  # the first byte is the little end
        one = torch.cat([one.repeat(256, 1), one.repeat_interleave(256, 0)], 1)
    return one.view(torch.int64).flatten().to(device)
