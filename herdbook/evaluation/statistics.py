"""Intervals: of a share (Wilson), and of the ratio of two perplexities (paired bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def wilson(right: float, total: float) -> Interval:
    """The share right/total. Unlike p ± z·sqrt(p·q/n) it is honest near 0 and 1.

    >>> wilson(30, 30).low > 0.88
    True
    """
    assert 0 <= right <= total and total > 0
    share, square = right / total, Z95 * Z95
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    half /= 1 + square / total
    return Interval(share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share))


def perplexity_ratio(
    before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]], draws: int = 2000
) -> Interval:
    """Perplexity after / before, paired by passage; each passage is (nll in nats, tokens).

    ratio = exp((Σ nll_after − Σ nll_before) / Σ tokens_before), so two models with different
    tokenizers compare on the same text. Passages are drawn with replacement, always both sides of a
    passage together: what makes a passage hard for both models cancels out.
    """
    assert len(before) == len(after) > 0
    rise = np.array([b - a for (a, _), (b, _) in zip(before, after, strict=True)])
    tokens = np.array([n for _, n in before], dtype=float)
    picks = np.random.default_rng(0).integers(0, len(rise), (draws, len(rise)))
    logs = rise[picks].sum(1) / np.maximum(tokens[picks].sum(1), 1)
    low, high = np.exp(np.quantile(logs, [0.025, 0.975]))
    return Interval(math.exp(rise.sum() / max(tokens.sum(), 1)), float(low), float(high))
