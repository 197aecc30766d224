"""The decoder's layers: linear (plain, int4, int8), embedding, norm, rotation.

T tokens, in/out features, B = in/32 blocks of a row.

Quantised layers keep a matrix in blocks: 32 neighbours of a row share a scale (and a minimum).
Every layer with a matrix has `dense(dtype)`, the matrix it stands for; that is what saving, merging
and the tests use, so a quantised layer's twin is `F.linear(x, layer.dense(x.dtype), layer.bias)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from herdbook.model.config import DecoderConfig
from herdbook.model.frozen import frozen_linear
from herdbook.model.fused import learns, rms_norm, turn
from herdbook.model.rope import rope_frequencies, rope_magnitude

BLOCK = 32
#: up to so many rows the int4 kernel beats dequantising and a float product
INT4_KERNEL_ROWS = 64
#: rows of an int8 matrix dequantised at a time: small enough for the cache, and for memory that the
#: allocator keeps (2,048 rows of 576 are fetched from the system each time, ten times slower)
INT8_ROWS = 512


class Linear(nn.Module):
    """y = x·Wᵀ + b, weight [out, in]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class Embedding(nn.Module):
    """ids [T] → rows of weight [vocab, hidden]."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def project(self, x: Tensor) -> Tensor:
        """The tied head: x [T, hidden] → [T, vocab]."""
        return F.linear(x, self.weight)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class Int4Linear(nn.Module):
    """y = x·Wᵀ + b with W = scale·code + minimum, codes of 4 bits, a scale a block of 32.

    codes uint8 [out, B, 16]: byte i of a block holds values i (low half) and i + 16 (high).
    scale, minimum float16 [out, B] (float32 where that does not hold them). Q4_1 is exactly this;
    Q4_0 is minimum = −8·scale, and compressed-tensors minimum = −zero point · scale.

    A few rows (decoding) are bound by memory: the CPU's kernel reads 4 bits a weight. It computes in
    bfloat16, with bfloat16 scales. Many rows (prefill) are bound by arithmetic: the matrix is
    dequantised once and multiplied in x's own format.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = codes.shape[0], codes.shape[1] * BLOCK
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
        #: few rows go through the kernel; false where float32 is to be kept
        self.has_kernel = self.outputs % 16 == 0
        #: what the kernel reads, made when it is first called: its codes, its scales and zeros
        self._packed: tuple[Tensor, Tensor] | None = None

    def _pack(self) -> tuple[Tensor, Tensor]:
        whole = torch.cat([self.codes & 15, self.codes >> 4], -1).view(self.outputs, self.inputs)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.int(), 1)
        # the kernel's formula is (code − 8)·scale + zero
        zero = self.minimum.float() + 8 * self.scale.float()
        both = torch.stack([self.scale.float(), zero], -1).transpose(0, 1)  # [B, out, 2]
        return packed, both.bfloat16().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.inputs
        kernel = self.has_kernel and rows <= INT4_KERNEL_ROWS and self.codes.device.type == "cpu"
        if learns(x) or not kernel:
            return frozen_linear(x, self)
        if self._packed is None:
            self._packed = self._pack()
        codes, scale_and_zero = self._packed
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.reshape(rows, self.inputs).bfloat16(), codes, BLOCK, scale_and_zero
        )
        y = y.to(x.dtype).view(*x.shape[:-1], self.outputs)
        return y if self.bias is None else y + self.bias

    def dense(self, dtype: torch.dtype) -> Tensor:
        d, m = self.scale.float()[..., None], self.minimum.float()[..., None]
        out = torch.empty(self.outputs, self.inputs // BLOCK, BLOCK, device=self.codes.device)
        torch.mul(self.codes & 15, d, out=out[..., : BLOCK // 2])
        torch.mul(self.codes >> 4, d, out=out[..., BLOCK // 2 :])
        return out.add_(m).view(self.outputs, self.inputs).to(dtype)


class Int8Linear(nn.Module):
    """y = x·Wᵀ + b, W = scale·code: codes int8 [out, B, 32], scale float32 [out, B] (Q8_0)."""

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.outputs, self.inputs = codes.shape[0], codes.shape[1] * BLOCK
        self.dtype = dtype
        self.codes, self.scale = nn.Buffer(codes), nn.Buffer(scale[..., None])
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """A strip of rows is dequantised at a time, so that it stays in the cache."""
        if learns(x):
            return frozen_linear(x, self)
        strips = range(0, self.outputs, INT8_ROWS)
        rows = (self._rows(slice(at, at + INT8_ROWS)).to(x.dtype) for at in strips)
        y = torch.cat([F.linear(x, some) for some in rows], -1)
        return y if self.bias is None else y + self.bias

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self._rows(slice(None)).to(dtype)

    def _rows(self, which: slice | Tensor) -> Tensor:
        return (self.codes[which] * self.scale[which]).view(-1, self.inputs)

    @classmethod
    def of(cls, weight: Tensor) -> Int8Linear:
        """weight [out, in] rounded to this form; one that came from it gets its very codes again."""
        blocks = weight.detach().float().view(len(weight), -1, BLOCK)
        scale = blocks.abs().amax(-1) / 127
        codes = torch.round(blocks / scale.clamp_min(1e-30)[..., None])
        return cls(codes.to(torch.int8), scale, None, weight.dtype)


class Int8Embedding(Int8Linear):
    """ids [T] → rows of the matrix, kept as Int8Linear keeps it; `project` is the tied head."""

    def forward(self, ids: Tensor) -> Tensor:
        return self._rows(ids).to(self.dtype)

    def project(self, x: Tensor) -> Tensor:
        return super().forward(x)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last axis, in float32. plus: 1 is added to the weight."""

    def __init__(self, size: int, eps: float, plus: bool = False) -> None:
        super().__init__()
        self.eps, self.plus = eps, plus
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + 1 if self.plus else self.weight.float()
        if learns(x, weight):
            return rms_norm(x, weight, self.eps)
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.eps).to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class LayerNorm(nn.Module):
    """(x − mean) / √(variance + eps) · weight + bias over the last axis, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, self.eps).to(x.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class Vector(nn.Module):
    """Numbers that a family keeps beside its matrices: one for each channel, or a table."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


def make_norm(config: DecoderConfig) -> RMSNorm | LayerNorm:
    """A norm over the hidden state, of the family's kind."""
    if config.norm == "ln":
        return LayerNorm(config.hidden, config.eps)
    return RMSNorm(config.hidden, config.eps, plus=config.norm == "rms1p")


# --- rotation (RoPE) -------------------------------------------------------------------------------


class Rotary:
    """cos and sin for the tokens' positions, in the half style: of R turning dimensions i turns with
    i + R/2. With two positions a token (rope2d) the first turns the first half of a head, the second
    the second."""

    def __init__(self, config: DecoderConfig, base: float = 0.0) -> None:
        self.frequencies = torch.from_numpy(rope_frequencies(config, base)).cpu()
        self.magnitude = rope_magnitude(config, base)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] or [T, 2] → cos, sin [T, 1, 1 or 2, R], with sin negated in its first half."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        at = positions if positions.ndim == 2 else positions[:, None]
        angle = at.float()[:, None, :, None] * self.frequencies
        cos, sin = angle.cos() * self.magnitude, angle.sin() * self.magnitude
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by its position's angles: (a, b) → (a·cos − b·sin, b·cos + a·sin).

    What of a head lies behind the dimensions that turn stays as it is.
    """
    parts, size = cos.shape[2], cos.shape[3]
    if parts * size < x.shape[-1]:
        turned = rotate(x[..., : parts * size], cos, sin)
        return torch.cat([turned, x[..., parts * size :]], -1)
    if parts == 1 and learns(x):
        return turn(x, cos[:, 0, :, : size // 2], sin[:, 0, :, size // 2 :])
    split = x.view(*x.shape[:-1], parts, size)
    return (split * cos + torch.roll(split, size // 2, -1) * sin).flatten(-2)
