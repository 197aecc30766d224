"""Rounding to Q4_1: what lies on the grid stays, and compensation is worth its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.compression import int4
from herdbook.files import gguf


def matrix(outputs: int = 48, inputs: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def through_file(weight: torch.Tensor) -> torch.Tensor:
    """What a reader of the file gets."""
    raw = gguf.quantise(weight.numpy(), "Q4_1")
    return torch.from_numpy(np.array(gguf.dequantise(raw, "Q4_1")))


def spread(inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs [T, I], as a network's are, and their factor."""
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(600, 24, generator=generator) @ torch.randn(24, inputs, generator=generator)
    x = few + 0.3 * torch.randn(600, inputs, generator=generator)
    return x, int4.factor(x.T @ x)


# below 1e-3 a step is a subnormal float16, with fewer digits than the extremes need
@given(st.integers(0, 1000), st.floats(1e-3, 10))
@settings(max_examples=30, deadline=None)
def test_the_file_holds_exactly_what_was_rounded(seed: int, size: float):
    weight = matrix(16, 96, seed) * size
    for rounded in (int4.nearest(weight), int4.compensated(weight, spread(96)[1])):
        assert torch.equal(through_file(rounded), rounded)
        assert torch.equal(int4.nearest(rounded), rounded)  # rounding again changes nothing


def test_rounding_is_to_the_nearest_of_sixteen():
    weight = matrix()
    groups = weight.view(48, -1, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (int4.nearest(weight) - weight).view(48, -1, 32).abs().amax(-1)
    assert (error <= 0.51 * step + 1e-4).all() and (error > 0.3 * step).any()
    codes = (int4.nearest(weight).view(48, -1, 32) - groups.amin(-1, keepdim=True)) / step[
        ..., None
    ]
    assert set(codes.round().int().unique().tolist()) == set(range(16))


def test_constant_and_zero_groups_stay():
    weight = torch.zeros(2, 64)
    weight[1] = 0.5
    assert torch.equal(int4.nearest(weight), weight)
    assert torch.equal(int4.compensated(weight, torch.eye(64)), weight)


def test_compensation_makes_the_output_truer():
    weight = matrix()
    x, factor = spread(128)
    wanted = x @ weight.T

    def error(rounded: torch.Tensor) -> float:
        return float((x @ rounded.T - wanted).pow(2).mean())

    assert error(int4.compensated(weight, factor)) < 0.5 * error(int4.nearest(weight))


def test_without_correlations_compensation_is_plain_rounding():
    weight = matrix()
    plain, same = int4.nearest(weight), int4.compensated(weight, torch.eye(128))
    assert torch.equal(plain, same)


def test_a_change_far_below_a_step_is_lost():
    """The danger of 4 bits after tuning: weights go back to where they were."""
    base = int4.nearest(matrix())
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(48, 2, generator=generator), torch.randn(2, 128, generator=generator)
    change = 0.0002 * up @ down
    x, _ = spread(128)
    wanted = x @ change.T
    left = x @ (int4.nearest(base + change) - base).T
    assert (left - wanted).pow(2).sum() > 0.7 * wanted.pow(2).sum()


@pytest.mark.parametrize("inputs", [64, 96])
def test_a_grouped_change_leaves_the_grid_s_codes(inputs: int):
    """What an adapter with group 32 adds: constants on groups, which move the minimum alone."""
    base = int4.nearest(matrix(48, inputs))
    change = 0.0005 * torch.randn(48, inputs // 32, generator=torch.Generator().manual_seed(4))
    moved = base + change.repeat_interleave(32, 1)
    rounded = int4.nearest(moved)
    step = base.view(48, -1, 32).diff(dim=-1).abs().amax()
    assert (rounded - moved).abs().max() < 0.001 * step  # what float16 keeps of the minimum
