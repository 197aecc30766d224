"""From rows of results to figures, each with its interval.

    {"metric": "acc", "value": 0.451, "low": 0.43, "high": 0.472, "stderr": 0.011, "chance": 0.25,
     "n": 2000, "metrics": {"acc": {…}}, "averages": {"by question": 0.451, "by group": 0.449},
     "groups": {"anatomy": {"n": 94, "value": 0.43}, …},
     "unparsed": {"count": 3, "share": 0.0015, "examples": [{"id", "reply", "why"}, …]},
     "seeds": {"0": 0.44, "1": 0.46}, "spread": 0.014}

Shares have Wilson's interval; means of other marks ± 1.96 standard errors. A mean of means (by group,
over tasks) takes the distances of each one's limits together, as the square root of their squares' sum
(MOVER; Zou and Donner, Statistics in Medicine 27, 2008): groups of one question, or all right, still have
their width.
With several seeds a question's mark is its mean over them: they are no further questions; of code,
pass@k (overlap.py) is there for k up to their number. What is no mean of marks but a figure of summed counts
(`POOLED`: a corpus's BLEU, a micro F1) has a bootstrap interval over questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from herdbook.evaluation.marks.overlap import pass_at_k
from herdbook.evaluation.marks.scorers import POOLED, pooled
from herdbook.evaluation.statistics import Z95, Interval, wilson
from herdbook.evaluation.tasks import choices
from herdbook.evaluation.tasks.task import Item, Task

#: replies that could not be read and are shown
EXAMPLES, EXAMPLE_CHARACTERS = 5, 400
#: of a bootstrap
DRAWS = 1000
#: the k of pass@k that are told; pass@1 is the mean
USUAL = (2, 5, 10, 20, 50, 100)

Rows = Sequence[Mapping[str, Any]]


def summarise(task: Task, items: Sequence[Item], rows: Mapping[int, Rows]) -> dict[str, Any]:
    """rows: of each seed, in the order of the items (of a text: of its windows)."""
    metric = task.metrics[0]
    if task.kind == "text":
        (some,) = rows.values()
        metrics = _of_text(some)
        return {"metric": metric, **metrics[metric], "n": len(some), "metrics": metrics}
    metrics = {name: _of(rows, name) for name in task.metrics}
    if "code" in metrics:
        metrics |= _passes(rows)
    found: dict[str, Any] = {"metric": metric, **metrics[metric], "n": len(items)}
    if task.kind == "choice":
        found["chance"] = fmean(
            choices.chance(metric, len(one.choices), len(one.right)) for one in items
        )
    found["metrics"] = metrics
    groups = _groups(items)
    if groups:
        found["groups"] = {
            name: {"n": len(places), **_of(_some(rows, places), metric)}
            for name, places in groups.items()
        }
        macro = _together([*found["groups"].values()])
        found["averages"] = {"by question": found["value"], "by group": macro["value"]}
        if task.average == "group":
            found |= macro
    found["average"] = f"by {task.average}" if groups else "by question"
    found["unparsed"] = _unparsed(rows, metric)
    if len(rows) > 1:
        each = {str(seed): _of({seed: some}, metric)["value"] for seed, some in rows.items()}
        found |= {"seeds": each, "spread": stdev(each.values())}
    return found


def overall(members: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of a group of tasks: the mean of their headlines, each task counting the same."""
    return {"average": "mean over tasks of their headlines"} | _together([*members.values()])


def _together(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of independent figures, each with its interval."""
    value = fmean(one["value"] for one in parts)
    below = math.hypot(*(one["value"] - one["low"] for one in parts)) / len(parts)
    above = math.hypot(*(one["high"] - one["value"] for one in parts)) / len(parts)
    return _plain(Interval(value, value - below, value + above), (below + above) / 2 / Z95)


def _mark(row: Mapping[str, Any], metric: str) -> float:
    """What counts: a reply that could not be read is wrong."""
    value = row["values"].get(metric)
    return 0.0 if value is None else float(value)


def _of(rows: Mapping[int, Rows], metric: str) -> dict[str, float]:
    """The figure of a metric over all questions, with its interval."""
    if metric in POOLED:
        return _pooled(rows, metric)
    return figure(_marks(rows, metric))


def _pooled(rows: Mapping[int, Rows], metric: str) -> dict[str, float]:
    """Of summed counts; a bootstrap draws questions, each with all its seeds."""
    counts = np.array([[row["counts"][metric] for row in some] for some in rows.values()])
    counts, worth = counts.sum(0), pooled(metric)
    size = len(counts)
    picked = np.random.default_rng(0).multinomial(size, [1 / size] * size, DRAWS)
    drawn = [worth(sums) for sums in (picked @ counts).tolist()]
    value, (low, high) = worth(counts.sum(0).tolist()), np.quantile(drawn, [0.025, 0.975])
    interval = Interval(value, min(float(low), value), max(float(high), value))
    return _plain(interval, float(np.std(drawn)))


def _passes(rows: Mapping[int, Rows]) -> dict[str, dict[str, float]]:
    """pass@k of code, for the usual k up to the number of seeds and for that number."""
    seeds = len(rows)
    right = [sum(_mark(row, "code") for row in same) for same in zip(*rows.values(), strict=True)]
    return {
        f"pass@{k}": figure([pass_at_k(seeds, round(count), k) for count in right])
        for k in sorted({seeds, *(k for k in USUAL if k < seeds)} - {1})
    }


def _marks(rows: Mapping[int, Rows], metric: str) -> list[float]:
    """Of each item, its mean over the seeds."""
    return [fmean(_mark(row, metric) for row in same) for same in zip(*rows.values(), strict=True)]


def figure(values: Sequence[float]) -> dict[str, float]:
    """The mean of marks from 0 to 1, with its interval."""
    value, error, total = fmean(values), _stderr(values), len(values)
    if not error or all(one in (0.0, 1.0) for one in values):
        return _plain(wilson(math.fsum(values), total), error)
    low, high = max(0.0, value - Z95 * error), min(1.0, value + Z95 * error)
    return _plain(Interval(value, low, high), error)


def _stderr(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _plain(interval: Interval, error: float) -> dict[str, float]:
    return interval.to_json() | {"stderr": error}


def _groups(items: Sequence[Item]) -> dict[str, list[int]]:
    """The places of each group's items."""
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if item.group:
            groups.setdefault(item.group, []).append(place)
    return dict(sorted(groups.items()))


def _some(rows: Mapping[int, Rows], places: Sequence[int]) -> dict[int, Rows]:
    return {seed: [same[place] for place in places] for seed, same in rows.items()}


def _unparsed(rows: Mapping[int, Rows], metric: str) -> dict[str, Any]:
    every = [row for some in rows.values() for row in some]
    lost = [row for row in every if row["values"].get(metric) is None]
    examples = [
        {
            "id": row["id"],
            "reply": row.get("judgement", row.get("reply", ""))[:EXAMPLE_CHARACTERS],
            "why": row["why"][metric],
        }
        for row in lost[:EXAMPLES]
    ]
    return {"count": len(lost), "share": len(lost) / len(every), "examples": examples}


def _of_text(rows: Rows) -> dict[str, dict[str, float]]:
    """Bits a byte, which compares across tokenizers, and perplexity a token, which does not."""
    found = {}
    for metric, size in (("bits_per_byte", "bytes"), ("perplexity", "tokens")):
        nll, over = [row["nll"] for row in rows], [row[size] for row in rows]
        rate = math.fsum(nll) / sum(over)
        off = [one - rate * much for one, much in zip(nll, over, strict=True)]
        error = _stderr(off) * len(rows) / sum(over)  # of a ratio of two sums
        low, high = rate - Z95 * error, rate + Z95 * error
        if metric == "perplexity":
            ends = (math.exp(rate), math.exp(low), math.exp(high), math.exp(rate) * error)
        else:
            ends = (rate / math.log(2), low / math.log(2), high / math.log(2), error / math.log(2))
        found[metric] = dict(zip(("value", "low", "high", "stderr"), ends, strict=True))
    return found
