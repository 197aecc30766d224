"""NF4: the paper's levels and rounding; the fast matrix is the formula's; nothing dense is kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from herdbook.model.layers import Int4Linear, Int8Linear
from herdbook.model.nf4 import BLOCK, LEVELS, NF4Linear


def made(outputs: int = 48, inputs: int = 192, bias: bool = True) -> tuple[NF4Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02
    b = torch.randn(outputs, generator=generator) if bias else None
    return NF4Linear(weight, b, torch.float32), weight


def test_levels_are_quantiles_of_the_normal_distribution():
    """arXiv 2305.14314, §3: eight quantiles above zero, seven below, of the same outermost one."""
    outermost = 0.9677083
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    wanted = torch.cat([below, torch.zeros(1), above.flip(0)]) / above.max()
    torch.testing.assert_close(torch.tensor(LEVELS).double(), wanted, atol=2e-6, rtol=0)


def test_each_weight_goes_to_the_nearest_level_of_its_block():
    layer, weight = made()
    blocks = weight.view(-1, BLOCK)
    shares = blocks / blocks.abs().amax(1, keepdim=True)
    nearest = (shares[..., None] - torch.tensor(LEVELS)).abs().argmin(-1)
    first = torch.stack([layer.codes >> 4, layer.codes & 15], -1).flatten(1)
    assert torch.equal(first.long(), nearest), "two in a byte, the first in the upper half"


def test_scales_are_rounded_twice():
    """Their distance from their mean in 8 bits: no scale is off by more than 0.0071 of the farthest."""
    layer, weight = made(200, 192)
    scale = weight.view(-1, BLOCK).abs().amax(1)
    assert float(layer.scale_mean) == pytest.approx(float(scale.mean()))
    assert layer.scale_scale.shape == (-(-len(scale) // 256),)
    bound = 0.9 / 64 / 2 * (scale - scale.mean()).abs().max()
    assert 0 < (layer.scale() - scale).abs().max() <= bound * 1.001


@pytest.mark.parametrize("shape", [(48, 192), (5, 7), (3, 64), (129, 4096)])
def test_the_matrix_is_the_formula_s(shape: tuple[int, int]):
    layer, weight = made(*shape)
    assert torch.equal(layer.dense(torch.float32), layer.plain())
    assert (layer.plain() - weight).norm() < 0.12 * weight.norm()
    half = layer.dense(torch.bfloat16).float()  # level, scale and product rounded, 2⁻⁸ each
    assert ((half - layer.plain()).abs() <= 3.05 * 2**-8 * layer.plain().abs()).all()
    assert torch.equal(layer.dense(torch.float64).float(), layer.plain())


def test_about_a_quarter_of_bfloat16():
    layer, weight = made(1536, 576, bias=False)
    held = sum(one.nbytes for one in layer.buffers())
    assert held * 8 / weight.numel() == pytest.approx(4.127, abs=0.001)
    assert not list(layer.parameters())


def few_bits(kind: str) -> NF4Linear | Int4Linear | Int8Linear:
    layer, weight = made()
    if kind == "nf4":
        return layer
    if kind == "int8":
        return Int8Linear.of(weight)
    codes = torch.randint(0, 256, (48, 6, 16), dtype=torch.uint8)
    scale = torch.rand(48, 6).half()
    return Int4Linear(codes, scale, -8 * scale, layer.bias, torch.float32)


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("rows", [3, 100])
def test_forward_and_backward_are_the_dense_twin_s(kind: str, rows: int):
    layer = few_bits(kind)
    x = torch.randn(2, rows, 192, requires_grad=True)
    above = torch.randn(2, rows, 48)
    matrix = layer.dense(torch.float32)
    got, want = layer(x), F.linear(x, matrix, layer.bias)
    torch.testing.assert_close(got, want)
    ours, theirs = (torch.autograd.grad(one, x, above)[0] for one in (got, want))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
def test_no_dense_matrix_waits_for_the_backward_pass(kind: str):
    """What autograd keeps of a layer is nothing; of plain F.linear it is the matrix."""
    layer = few_bits(kind)
    kept: list[tuple[int, ...]] = []

    def note(one: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(one.shape))
        return one

    x = torch.randn(5, 192, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
        layer(x)
        assert not kept
        F.linear(x, layer.dense(torch.float32))
    assert (48, 192) in kept or (192, 48) in kept
