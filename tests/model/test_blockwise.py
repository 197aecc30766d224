"""Eight bits by blocks: the published levels, the nearest of them, and how far off that is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.model import blockwise


def test_the_levels_are_the_published_ones():
    """arXiv 2110.02861 and bitsandbytes: seven decades, each with twice the levels of the one below."""
    signed, unsigned = blockwise.levels(True), blockwise.levels(False)
    for values in (signed, unsigned):
        assert len(values.unique()) == 256 and values[-1] == 1 and (values == 0).any()
        assert torch.equal(values, values.sort().values)
    assert signed[0] == pytest.approx(-0.9929687) and signed[-2] == pytest.approx(0.9929687)
    assert int((signed > 0.1).sum()) == 64 + 1 and int((unsigned > 0.1).sum()) == 128 + 1
    assert unsigned[-2] == pytest.approx(0.9964844) and unsigned[1] == pytest.approx(3.25e-7)
    assert signed[signed > 0].min() == pytest.approx(5.5e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_nearest_level(signed: bool):
    """Against a search among the middles, on numbers of all sizes, middles and levels themselves."""
    levels = blockwise.levels(signed)
    middles = (levels[1:] + levels[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** -(8 * torch.rand(20_000, generator=generator))
    sizes *= torch.randn(20_000, generator=generator).sign()
    shares = torch.cat([levels, middles, sizes if signed else sizes.abs(), torch.tensor([-0.0])])
    shares = torch.cat([one if len(one) == 256 else torch.cat([one, torch.tensor([1.0])])
                        for one in shares.split(255)])  # fmt: skip
    shares[-1] = 1.0  # each block's scale is 1, so numbers are shares
    codes, scale = blockwise.encode(shares, signed)
    assert torch.equal(codes.long(), torch.bucketize(shares, middles))
    assert torch.equal(blockwise.decode(codes, scale, signed), levels[codes.long()])


@given(st.integers(1, 700), st.floats(1e-20, 1e20), st.booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_number_moves_by_half_a_level_s_distance_at_most(count, size, signed, seed):
    """0.0071 of the block's largest at most; 0.0036 where no number is negative. Below a tenth of the
    largest no further than half the decade's spacing, which falls with the decade."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * size
    numbers = numbers if signed else numbers.abs()
    codes, scale = blockwise.encode(numbers, signed)
    assert codes.shape == (count,) and scale.shape == (-(-count // 256),)
    back = blockwise.decode(codes, scale, signed)
    largest = scale.repeat_interleave(256)[:count]
    step = 0.9 / (64 if signed else 128)
    off = (back - numbers).abs() / largest
    assert off.max() <= step / 2 + 1e-6
    assert (off <= torch.where(numbers.abs() < largest / 10, step / 5, step / 2) + 1e-6).all()
    if signed:
        assert torch.equal(back[numbers == largest], numbers[numbers == largest])


def test_zeros_stay_zeros():
    codes, scale = blockwise.encode(torch.zeros(300), False)
    assert not blockwise.decode(codes, scale, False).any()
