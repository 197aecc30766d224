"""Quantised layers against their dequantised twins; rotation against complex numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from herdbook.files import gguf
from herdbook.model.config import DecoderConfig
from herdbook.model.layers import (
    INT4_KERNEL_ROWS,
    Int4Linear,
    Int8Linear,
    RMSNorm,
    Rotary,
    rotate,
)
from herdbook.model.rope import rope_frequencies

CONFIG = DecoderConfig(
    vocab=50, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, max_pos=64
)


def int4(outputs: int, inputs: int, bias: bool = False) -> tuple[Int4Linear, torch.Tensor]:
    """A layer and the matrix that the GGUF reader says it stands for."""
    values = np.random.default_rng(0).normal(size=(outputs, inputs)).astype(np.float32)
    raw = gguf.quantise(values, "Q4_1").reshape(outputs, inputs // 32, 20)
    heads = torch.from_numpy(raw[..., :4].copy()).view(torch.float16)
    codes = torch.from_numpy(raw[..., 4:].copy())
    b = torch.randn(outputs) if bias else None
    layer = Int4Linear(codes, heads[..., 0], heads[..., 1], b, torch.float32)
    return layer, torch.from_numpy(gguf.dequantise(raw, "Q4_1").reshape(outputs, inputs))


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (192, 576), (16, 32), (24, 64)])
@pytest.mark.parametrize("rows", [1, 3, INT4_KERNEL_ROWS, INT4_KERNEL_ROWS + 1, 100])
def test_int4_is_its_dequantised_twin(outputs: int, inputs: int, rows: int) -> None:
    layer, matrix = int4(outputs, inputs, bias=True)
    assert torch.equal(layer.dense(torch.float32), matrix)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    got, want = layer(x), F.linear(x, matrix, layer.bias)
    assert got.dtype == torch.float32
    few = rows <= INT4_KERNEL_ROWS and layer.has_kernel  # the kernel computes in bfloat16
    assert (got - want).abs().max() <= (2e-2 if few else 1e-5) * want.abs().max()


def test_a_gradient_passes_through_int4() -> None:
    layer, matrix = int4(64, 64)
    x = torch.randn(4, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, matrix.sum(0).expand(4, 64))


def int8(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    raw = gguf.quantise(values, "Q8_0").reshape(rows, columns // 32, 34)
    scale = torch.from_numpy(raw[..., :2].copy()).view(torch.float16)[..., 0].float()
    codes = torch.from_numpy(raw[..., 2:].copy()).view(torch.int8)
    return codes, scale, torch.from_numpy(gguf.dequantise(raw, "Q8_0").reshape(rows, columns))


@pytest.mark.parametrize("rows", [1, 5])
def test_int8_is_its_dequantised_twin(rows: int) -> None:
    """5,000 rows are several strips, the last one short."""
    codes, scale, matrix = int8(5000, 64)
    x = torch.randn(rows, 64)
    linear = Int8Linear(codes, scale, torch.randn(5000), torch.float32)
    torch.testing.assert_close(linear(x), F.linear(x, matrix, linear.bias), atol=1e-4, rtol=1e-5)
    assert torch.equal(linear.dense(torch.float32), matrix)
    x.requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, matrix.sum(0).expand(rows, 64), atol=1e-3, rtol=1e-4)


def test_norm_is_computed_in_float32() -> None:
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    torch.nn.init.ones_(norm.weight)
    x = (torch.randn(3, 64) * 1000).to(torch.bfloat16)
    want = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), want.to(torch.bfloat16))


def test_rotation_is_multiplication_by_a_unit_complex_number() -> None:
    x = torch.randn(5, 2, 8)
    positions = torch.tensor([0, 1, 7, 3, 100])
    angle = positions[:, None] * (10_000.0 ** (-torch.arange(4) / 4))
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angle)[:, None]
    want = torch.cat([turned.real, turned.imag], -1)
    got = rotate(x, *Rotary(CONFIG)(positions, torch.float32))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_frequencies_stay_float32_in_a_bfloat16_model() -> None:
    cos, _ = Rotary(CONFIG)(torch.tensor([4097]), torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert cos[0, 0, 0, 0] == torch.tensor(4097.0).cos().bfloat16(), "4097 is no bfloat16"
    assert rope_frequencies(replace(CONFIG, rope_base=1e6)).dtype == np.float32
