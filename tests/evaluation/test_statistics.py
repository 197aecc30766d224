"""Intervals against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdbook.evaluation.statistics import Z95, perplexity_ratio, wilson


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_its_equation(case: tuple[int, int]) -> None:
    """Its ends are the p for which the observed share lies z standard errors away."""
    right, total = case
    found = wilson(right, total)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for p in (found.low, found.high):
        if 1e-9 < p < 1 - 1e-9:
            z = abs(found.value - p) / math.sqrt(p * (1 - p) / total)
            assert z == pytest.approx(Z95, rel=1e-6)


def test_wilson_is_not_certain_of_a_perfect_score() -> None:
    assert wilson(38, 38).low == pytest.approx(0.908, abs=0.001)
    assert wilson(0, 38).high == pytest.approx(0.092, abs=0.001)


def test_ratio_is_that_of_the_perplexities() -> None:
    before = [(30.0, 10), (50.0, 20), (42.0, 15)]
    after = [(33.0, 10), (49.0, 20), (45.0, 15)]
    found = perplexity_ratio(before, after)
    assert found.value == pytest.approx(math.exp(127 / 45) / math.exp(122 / 45))
    assert found.low <= found.value <= found.high
    same = perplexity_ratio(before, before)
    assert (same.low, same.value, same.high) == (1, 1, 1)


def test_ratio_compares_other_tokenizers_on_the_same_text() -> None:
    """Twice the tokens, the same surprise a passage: no better and no worse."""
    before, after = [(30.0, 10), (50.0, 20)], [(30.0, 20), (50.0, 40)]
    assert perplexity_ratio(before, after).value == 1


def test_pairing_narrows_and_the_interval_covers() -> None:
    """Of 100 experiments with a true rise of 1 %, about 95 intervals hold it."""
    dice = np.random.default_rng(7)
    held = 0
    for _ in range(100):
        tokens = dice.integers(30, 60, 40)
        hard = dice.normal(3.0, 1.0, 40)  # passages differ far more than models do
        rise = dice.normal(0.01, 0.02, 40)
        before = [(float(h * n), int(n)) for h, n in zip(hard, tokens, strict=True)]
        after = [(float((h + r) * n), int(n)) for h, r, n in zip(hard, rise, tokens, strict=True)]
        found = perplexity_ratio(before, after, draws=500)
        assert found.high - found.low < 0.03
        held += found.low <= math.exp(0.01) <= found.high
    assert 86 <= held <= 99
