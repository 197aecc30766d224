"""Paired comparison against scipy, closed forms and simulated experiments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from herdbook.evaluation import paired


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_mcnemar_is_the_binomial_test(won: int, lost: int, same: int) -> None:
    before = [0] * won + [1] * lost + [1] * same
    after = [1] * won + [0] * lost + [1] * same
    found = paired.mcnemar(before, after)
    assert (found.won, found.lost) == (won, lost)
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_thousands_stays_exact() -> None:
    found = paired.mcnemar([0] * 5200 + [1] * 5000, [1] * 5200 + [0] * 5000)
    assert found.p == pytest.approx(stats.binomtest(5000, 10200).pvalue, rel=1e-9)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=50))
def test_standard_error_is_scipys_and_groups_of_one_change_nothing(values: list[float]) -> None:
    expected = stats.sem(values)
    assert paired.standard_error(values) == pytest.approx(expected, abs=1e-12)
    assert paired.standard_error(values, range(len(values))) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.integers(2, 5))
def test_copies_of_an_item_are_no_new_evidence(values: list[float], copies: int) -> None:
    """Each item asked k times with one answer: the error is that of the items, not √k smaller."""
    many = [value for value in values for _ in range(copies)]
    groups = [f"text {n}" for n in range(len(values)) for _ in range(copies)]
    assert paired.standard_error(many, groups) == pytest.approx(stats.sem(values), abs=1e-12)


def test_equal_groups_have_the_error_of_their_means() -> None:
    table = np.random.default_rng(3).normal(size=(12, 7))
    groups = [n for n in range(12) for _ in range(7)]
    found = paired.standard_error(list(table.ravel()), groups)
    assert found == pytest.approx(stats.sem(table.mean(1)))
    assert math.isnan(paired.standard_error([1.0, 2.0], ["one", "one"]))


def test_bootstrap_agrees_with_scipys() -> None:
    dice = np.random.default_rng(1)
    before, rise = dice.normal(5, 3, 80), dice.normal(0.4, 1, 80)
    found = paired.mean_difference(list(before), list(before + rise), draws=8000)
    theirs = stats.bootstrap(
        (rise,), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.value == pytest.approx(rise.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)


@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_covers(grouped: bool) -> None:
    """Of 200 experiments with a true rise of 0.1, about 190 intervals hold it; were groups taken for
    independent items, far fewer would."""
    dice = np.random.default_rng(11)
    held = naive = 0
    for _ in range(200):
        common = np.repeat(dice.normal(0, 0.5, 50), 4) if grouped else 0.0
        hard = dice.normal(0, 5, 200)
        after = hard + 0.1 + common + dice.normal(0, 0.5, 200)
        groups = [n // 4 for n in range(200)] if grouped else None
        found = paired.mean_difference(list(hard), list(after), groups, draws=400)
        held += found.low <= 0.1 <= found.high
        plain = paired.mean_difference(list(hard), list(after), draws=400)
        naive += plain.low <= 0.1 <= plain.high
    assert 180 <= held <= 198
    assert naive < 170 if grouped else naive == held


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = list(range(30)), [n + n % 3 for n in range(30)]
    whole = paired.mean_difference(before, after, draws=100)
    monkeypatch.setattr(paired, "_CELLS", 30 * 7)
    assert paired.mean_difference(before, after, draws=100) == whole


def test_what_is_detectable_is_detected_at_its_power() -> None:
    """A true difference of that size is significant in about 80 % of simulated experiments."""
    found = paired.detectable_difference(1.0, 100)
    assert found == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / 10)
    draws = np.random.default_rng(5).normal(found, 1.0, (4000, 100))
    seen = np.abs(draws.mean(1)) / 0.1 > stats.norm.ppf(0.975)
    assert seen.mean() == pytest.approx(0.8, abs=0.02)


def test_seeds() -> None:
    runs = [[1, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    found = paired.over_seeds(runs)
    assert found.mean == pytest.approx(0.75) and found.runs == 3
    assert found.seed_deviation == pytest.approx(np.std([0.75, 0.5, 1.0], ddof=1))
    assert found.item_error == pytest.approx(stats.sem([1, 1 / 3, 2 / 3, 1]))
    one = paired.over_seeds([[1]])
    assert one.seed_deviation is None and one.item_error is None


def test_compare_says_all_of_it() -> None:
    before, after = [0, 0, 1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 0, 1]
    found = paired.compare(before, after)
    assert found["difference"]["value"] == found["after"] - found["before"] == 3 / 8
    assert found["mcnemar"] == {"won": 4, "lost": 1, "p": 0.375}
    # Agresti and Min: 4.5 won and 1.5 lost of 10, as half an item stands in each of four cells
    error = math.sqrt(4.5 + 1.5 - 3**2 / 10) / 10
    assert found["standard_error"] == pytest.approx(error)
    assert found["difference"]["low"] == pytest.approx(0.3 - 1.959964 * error)
    assert found["detectable"] == pytest.approx(paired.detectable_difference(error * 8**0.5, 8))
    assert "mcnemar" not in paired.compare([0.5, 1], [1, 1])


def test_a_few_items_that_agree_prove_nothing() -> None:
    for before, after in (([0, 0, 0], [1, 1, 1]), ([1] * 10, [1] * 10), ([0], [1])):
        found = paired.compare(before, after)
        assert found["difference"]["low"] <= 0 < found["difference"]["high"]
        assert found["detectable"] > 0.1
    for before, after in (([0.3, 0.3], [0.5, 0.5]), ([0.3], [0.9])):  # no marks of right and wrong
        found = paired.compare(before, after)
        assert found["difference"]["low"] < 0 < found["difference"]["high"] <= 1


@pytest.mark.parametrize(
    ("count", "won", "lost"), [(12, 0.1, 0.05), (60, 0.2, 0.2), (400, 0.02, 0)]
)
def test_matched_shares_cover(count: int, won: float, lost: float) -> None:
    """Its 95 % interval holds the true difference in at least 94 of 100 experiments."""
    dice, held = np.random.default_rng(3), 0
    for _ in range(2000):
        rise = dice.choice([1, -1, 0], count, p=[won, lost, 1 - won - lost])
        interval, _ = paired.matched((rise < 0).astype(float), (rise > 0).astype(float))
        held += interval.low <= won - lost <= interval.high
    assert held / 2000 > 0.94
