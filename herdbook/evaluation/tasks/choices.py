"""What the likelihoods of choices tell: which is taken, and what each metric gives for it.

========== =======================================================================================
acc        the likeliest choice (sum of its tokens' log-likelihoods) is a right one
acc_norm   the same by log-likelihood a character of the choice's text: long ones are not punished
acc_bytes  the same by log-likelihood a byte
mrr        1 / the right choice's rank, the likeliest at rank 1; of several right ones the best's
mrr_bytes  the same by log-likelihood a byte
mass       share of the choices' probability that is on right ones (TruthfulQA's mc2)
========== =======================================================================================

acc, acc_norm and acc_bytes are lm-evaluation-harness's of the same names, but for ties. Choices that
are exactly as likely share their places: of two at the top one is taken by lot, so the score is what is
right on average, ½. A model that finds all alike scores what chance does.

>>> worth("acc", [-1.0, -1.0, -2.0], ["A", "B", "C"], {0})
0.5
>>> worth("mrr", [-1.0, -2.0, -3.0], ["A", "B", "C"], {2})
0.3333333333333333
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def worth(
    metric: str, logprobs: Sequence[float], texts: Sequence[str], right: Collection[int]
) -> float:
    """0 to 1. logprobs: nats, one for each choice; texts: of the choices, as they are scored."""
    sizes = {
        "norm": [len(text) for text in texts],
        "bytes": [len(text.encode()) for text in texts],
    }.get(metric.partition("_")[2], [1] * len(texts))
    values = [value / size for value, size in zip(logprobs, sizes, strict=True)]
    if metric == "mass":
        top = max(values)
        weights = [math.exp(value - top) for value in values]
        return math.fsum(weights[place] for place in right) / math.fsum(weights)
    if metric.startswith("acc"):
        best = max(values)
        taken = [place for place, value in enumerate(values) if value == best]
        return sum(place in right for place in taken) / len(taken)
    assert metric.startswith("mrr"), metric
    mine = max(values[place] for place in right)
    before = sum(value > mine for value in values)
    alike = sum(value == mine for value in values)
    good = sum(values[place] == mine for place in right)
    return _first(before, alike, good)


def _first(before: int, alike: int, good: int) -> float:
    """Mean of 1 / rank of the first of `good` among `alike` that stand in any order after `before`."""
    orders = math.comb(alike, good)
    return math.fsum(
        math.comb(alike - place, good - 1) / orders / (before + place)
        for place in range(1, alike - good + 2)
    )


def chance(metric: str, choices: int, right: int) -> float:
    """What a model that finds all choices alike scores."""
    return worth(metric.partition("_")[0], [0.0] * choices, [""] * choices, range(right))
