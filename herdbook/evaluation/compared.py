"""Two models asked the same tasks: their marks paired question by question (paired.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from herdbook.book.book import Artifact
from herdbook.book.step import Bench
from herdbook.errors import ConfigError
from herdbook.evaluation import paired
from herdbook.evaluation.tasks import items
from herdbook.evaluation.tasks.step import ITEMS, Evaluate, read, report_name
from herdbook.evaluation.tasks.task import Group, Task


def members(tasks: Sequence[str]) -> dict[str, str]:
    """Each task's name → what it is asked for by; those of groups in place of the groups. A text is no
    task of questions."""
    refs: list[str] = []
    for one in tasks:
        found = items.find(one)
        refs += found.tasks if isinstance(found, Group) else [one]
    for ref in refs:
        if isinstance(items.find(ref), Group):
            raise ConfigError(
                f"task {ref}", rule="is a group within a group", next="name its own tasks"
            )
    named: dict[str, str] = {}
    for ref in refs:
        task = items.find(ref)
        if isinstance(task, Task) and task.kind == "text":
            raise ConfigError(
                f"task {ref}",
                rule="is a text: it has no questions that two models could answer side by side",
                next="compare their perplexity of it: --text FILE (in a recipe: text)",
            )
        if named.setdefault(task.name, ref) != ref:
            raise ConfigError(
                f"tasks {named[task.name]} and {ref}",
                rule=f"are both called {task.name}",
                next="give one of the files another name",
            )
    return named


def on_tasks(
    before: Artifact, after: Artifact, tasks: Sequence[str], limit: int, bench: Bench
) -> dict[str, Any]:
    """Of each task what `paired_reports` says; both sides' reports are in the book, made or found."""
    found = {}
    for name, ref in members(tasks).items():
        sides = [
            Evaluate(one.id, ref, limit).run(
                bench.book, name=report_name(one, ref), progress=bench.progress
            )
            for one in (before, after)
        ]
        found[name] = paired_reports(*sides)
    return found


def paired_reports(before: Artifact, after: Artifact) -> dict[str, Any]:
    """{"metric", "before": {"value", "low", "high"}, "after": …, "difference": {…}, "items",
    "detectable", "mcnemar": {"won", "lost", "p"}, "unparsed": [share, share], "reports": [id, id]}"""
    heads = [read(one) for one in (before, after)]
    metric = heads[0]["metric"]
    marks = [_marks(one.path / ITEMS, metric) for one in (before, after)]
    assert list(marks[0]) == list(marks[1]), "one task of one version on one file"
    found = paired.compare([*marks[0].values()], [*marks[1].values()])
    for side, head in zip(("before", "after"), heads, strict=True):
        # each question counts the same, as in the difference, whatever the task's own average
        found[side] = {key: head["metrics"][metric][key] for key in ("value", "low", "high")}
    return found | {
        "metric": metric,
        "unparsed": [head["unparsed"]["share"] for head in heads],
        "reports": [before.id, after.id],
    }


def _marks(path: Path, metric: str) -> dict[str, float]:
    """id → mark; a reply that could not be read is wrong."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {str(row["id"]): float(row["values"][metric] or 0.0) for row in rows}
