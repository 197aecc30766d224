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
With several seeds a question's mark is its mean over them: they are no further questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from herdbook.evaluation.statistics import Z95, Interval, wilson
from herdbook.evaluation.tasks import choices
from herdbook.evaluation.tasks.task import Item, Task

#: replies that could not be read and are shown
EXAMPLES, EXAMPLE_CHARACTERS = 5, 400

Rows = Sequence[Mapping[str, Any]]


def summarise(task: Task, items: Sequence[Item], rows: Mapping[int, Rows]) -> dict[str, Any]:
    """rows: of each seed, in the order of the items (of a text: of its windows)."""
    metric = task.metrics[0]
    if task.kind == "text":
        (some,) = rows.values()
        metrics = _of_text(some)
        return {"metric": metric, **metrics[metric], "n": len(some), "metrics": metrics}
    marks = {name: _marks(rows, name) for name in task.metrics}
    metrics = {name: _figure(values) for name, values in marks.items()}
    found: dict[str, Any] = {"metric": metric, **metrics[metric], "n": len(items)}
    if task.kind == "choice":
        found["chance"] = fmean(
            choices.chance(metric, len(one.choices), len(one.right)) for one in items
        )
    found["metrics"] = metrics
    groups = _groups(items, marks[metric])
    if groups:
        macro = _together([_figure(values) for values in groups.values()])
        found["averages"] = {"by question": found["value"], "by group": macro["value"]}
        if task.average == "group":
            found |= macro
        found["groups"] = {
            name: {"n": len(values), "value": fmean(values)} for name, values in groups.items()
        }
    found["average"] = f"by {task.average}" if groups else "by question"
    found["unparsed"] = _unparsed(rows, metric)
    if len(rows) > 1:
        each = {str(seed): fmean(_mark(row, metric) for row in some) for seed, some in rows.items()}
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


def _marks(rows: Mapping[int, Rows], metric: str) -> list[float]:
    """Of each item, its mean over the seeds."""
    return [fmean(_mark(row, metric) for row in same) for same in zip(*rows.values(), strict=True)]


def _figure(values: Sequence[float]) -> dict[str, float]:
    value, error, total = fmean(values), _stderr(values), len(values)
    if not error or all(one in (0.0, 1.0) for one in values):
        return _plain(wilson(math.fsum(values), total), error)
    low, high = max(0.0, value - Z95 * error), min(1.0, value + Z95 * error)
    return _plain(Interval(value, low, high), error)


def _stderr(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _plain(interval: Interval, error: float) -> dict[str, float]:
    return interval.to_json() | {"stderr": error}


def _groups(items: Sequence[Item], marks: Sequence[float]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for item, value in zip(items, marks, strict=True):
        if item.group:
            groups.setdefault(item.group, []).append(value)
    return dict(sorted(groups.items()))


def _unparsed(rows: Mapping[int, Rows], metric: str) -> dict[str, Any]:
    every = [row for some in rows.values() for row in some]
    lost = [row for row in every if row["values"].get(metric) is None]
    examples = [
        {
            "id": row["id"],
            "reply": row.get("reply", "")[:EXAMPLE_CHARACTERS],
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
