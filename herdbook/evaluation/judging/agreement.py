"""Does a judge agree with people? Raw agreement and Cohen's kappa (1960), each with its interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from herdbook.evaluation.statistics import Interval


@dataclass(frozen=True)
class Agreement:
    """Kappa is 1 for perfect agreement and 0 for as much as chance would give."""

    raw: Interval
    kappa: Interval
    items: int

    def to_json(self) -> dict[str, Any]:
        kappa = None if math.isnan(self.kappa.value) else self.kappa.to_json()
        return {"raw": self.raw.to_json(), "kappa": kappa, "items": self.items}


def kappa(left: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """(p_o − p_e) / (1 − p_e); not a number where both sides know one label only.

    >>> round(kappa("AABB", "AABA"), 3)
    0.5
    """
    assert len(left) == len(right) > 0
    n = len(left)
    ones, twos = Counter(left), Counter(right)
    chance = sum(ones[label] * twos[label] for label in ones) / n**2
    same = sum(a == b for a, b in zip(left, right, strict=True)) / n
    return (same - chance) / (1 - chance) if chance < 1 else math.nan


def agreement(
    judge: Sequence[Hashable], people: Sequence[Hashable], draws: int = 2000, seed: int = 0
) -> Agreement:
    """Over the same items; 95 % intervals by bootstrap over items."""
    assert len(judge) == len(people) > 0
    names = {label: n for n, label in enumerate(dict.fromkeys([*judge, *people]))}
    left, right = (np.array([names[label] for label in side]) for side in (judge, people))
    picks = np.random.default_rng(seed).integers(0, len(left), (draws, len(left)))
    ones, twos = left[picks], right[picks]
    same = (ones == twos).mean(1)
    chance = sum((ones == n).mean(1) * (twos == n).mean(1) for n in range(len(names)))
    with np.errstate(invalid="ignore", divide="ignore"):
        kappas = np.where(chance < 1, (same - chance) / (1 - chance), np.nan)
    defined = kappas[~np.isnan(kappas)]
    raw = Interval(float((left == right).mean()), *_ends(same))
    ends = _ends(defined) if len(defined) else (math.nan, math.nan)
    return Agreement(raw, Interval(kappa(judge, people), *ends), len(left))


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
