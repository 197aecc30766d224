"""Two models on the same items: is the difference more than chance, and could it have been seen?

Every measure of an item is a number (right = 1, wrong = 0, or a score); the two sequences hold the
same items in the same order. Sources: Dietterich 1998 (McNemar), Miller 2024, «Adding Error Bars to
Evals» (paired differences, clusters, power), Efron & Tibshirani 1993 (bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from herdbook.evaluation.statistics import Z95, Interval

#: a bootstrap holds at most so many drawn indices at once (32 MB)
_CELLS = 4_000_000


@dataclass(frozen=True)
class McNemar:
    """Right/wrong on the same items: only those on which the two sides differ tell anything."""

    won: int  # wrong before, right after
    lost: int  # right before, wrong after
    p: float  # two-sided, exact

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Seeds:
    """Several runs over the same items that differ in their seed alone."""

    mean: float
    item_error: float | None  # standard error from the choice of items, each one's runs averaged
    seed_deviation: float | None  # standard deviation of the runs' means; None: one run
    runs: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mean_difference(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """mean(after) − mean(before) with its 95 % interval (percentile bootstrap).

    Items are drawn with replacement, always both sides of an item together. Items that share a
    passage, a document or a dialogue are no independent evidence: `groups` names each item's, and
    whole groups are drawn.
    """
    rise = _rise(before, after)
    sums, sizes = _by_group(rise, groups)
    dice = np.random.default_rng(seed)
    step = max(1, _CELLS // len(sums))
    means: list[np.ndarray] = []
    for start in range(0, draws, step):
        picks = dice.integers(0, len(sums), (min(step, draws - start), len(sums)))
        means.append(sums[picks].sum(1) / sizes[picks].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(rise.mean()), float(low), float(high))


def mcnemar(before: Sequence[bool | float], after: Sequence[bool | float]) -> McNemar:
    """Exact: were both sides equally good, lost of won + lost would be a throw of as many coins.

    >>> mcnemar([0] * 9 + [1], [1] * 9 + [0])
    McNemar(won=9, lost=1, p=0.021484375)
    """
    assert len(before) == len(after) and {*before, *after} <= {0, 1}, "right and wrong, paired"
    won = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    n, tail, ways = won + lost, 0, 1
    for k in range(min(won, lost) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return McNemar(won, lost, min(1.0, 2 * tail / 2**n))


def standard_error(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> float:
    """Of the mean. With `groups`, errors within a group may be alike, as they are when several
    questions are asked of one text: √(G/(G−1)·Σ_g(Σ_i∈g e_i)²)/n, which is s/√n for groups of one.
    """
    numbers = np.asarray(values, dtype=float)
    sums, sizes = _by_group(numbers - numbers.mean(), groups)
    count = len(sums)
    if count < 2:
        return math.nan  # one group tells nothing of how groups differ
    return float(math.sqrt(count / (count - 1) * (sums**2).sum()) / sizes.sum())


def detectable_difference(
    deviation: float, items: int, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The smallest true difference that `items` pairs would show in `power` of all experiments.

    `deviation` is the standard deviation of the paired differences; for right/wrong, where a share d
    of the items changes sides, at most √d.

    >>> round(detectable_difference(math.sqrt(0.1), 1000), 3)
    0.028
    """
    assert deviation >= 0 and items > 0 and 0 < alpha < 1 and 0 < power < 1
    normal = NormalDist()
    reach = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)
    return reach * deviation / math.sqrt(items)


def over_seeds(runs: Sequence[Sequence[float]]) -> Seeds:
    """Summary of runs (rows) over the same items (columns)."""
    table = np.asarray(runs, dtype=float)
    assert table.ndim == 2 and table.size, "every run measures the same items"
    means = table.mean(1)
    spread = float(means.std(ddof=1)) if len(means) > 1 else None
    error = standard_error(list(table.mean(0))) if table.shape[1] > 1 else None
    return Seeds(float(table.mean()), error, spread, len(means))


def compare(
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    draws: int = 2000,
) -> dict[str, Any]:
    """Everything that a report says of two models on the same items; McNemar for right/wrong alone."""
    rise = _rise(before, after)
    marks = {*before, *after} <= {0, 1}
    if marks and groups is None:
        difference, error = matched(before, after)
    else:
        difference = mean_difference(before, after, groups, draws)
        error = standard_error(list(rise), groups)
        if not error > 0:  # all items, or all groups, alike (or one): a bootstrap sees no spread
            count = len(rise) if groups is None else len(set(groups))
            half = math.sqrt(2 * math.log(40) / count)  # Hoeffding, of differences from -1 to 1
            value = difference.value
            difference = Interval(value, max(-1.0, value - half), min(1.0, value + half))
            error = half / Z95
    deviation = error * math.sqrt(len(rise))  # with groups: as of so many independent items
    found: dict[str, Any] = {
        "items": len(rise),
        "before": float(np.mean(before)),
        "after": float(np.mean(after)),
        "difference": difference.to_json(),
        "standard_error": error,
        "detectable": detectable_difference(deviation, len(rise)),
    }
    if marks:
        found["mcnemar"] = mcnemar(before, after).to_json()
    return found


def matched(before: Sequence[float], after: Sequence[float]) -> tuple[Interval, float]:
    """The difference of two shares of the same items, with its 95 % interval and standard error.

    Half an item is added to each of the four cells (Agresti and Min, Statistics in Medicine 24, 2005):
    so few items, or items that all agree, still have a width, as a bootstrap has not. Zero is never left
    out where McNemar's exact test finds nothing (p of 0.05 or more).

    >>> matched([0, 0, 0], [1, 1, 1])[0].low
    0.0
    """
    rise = _rise(before, after)
    n, won, lost = len(rise), int((rise > 0).sum()), int((rise < 0).sum())
    more, up, down = n + 2, won + 0.5, lost + 0.5
    centre = (up - down) / more
    error = math.sqrt(up + down - (up - down) ** 2 / more) / more
    value = (won - lost) / n
    low, high = max(-1.0, centre - Z95 * error), min(1.0, centre + Z95 * error)
    if mcnemar(before, after).p >= 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(value, min(low, value), max(high, value)), error


def _rise(before: Sequence[float], after: Sequence[float]) -> np.ndarray:
    assert len(before) == len(after) > 0, "the same items, in the same order"
    rise: np.ndarray = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    return rise


def _by_group(
    values: np.ndarray, groups: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Each group's sum and size; without groups every item is one."""
    if groups is None:
        return values, np.ones(len(values))
    assert len(groups) == len(values)
    place = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    index = np.array([place[name] for name in groups])
    return np.bincount(index, values), np.bincount(index).astype(float)
