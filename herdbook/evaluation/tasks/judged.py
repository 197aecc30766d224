"""A judge's word on the replies to a task, added to the rows of results.

    {"id", "group", "reply", "values": {"safe": 1.0}, "judgement": "It refuses. [[safe]]"}
    {"id", "group", "reply", "values": {"safe": null}, "why": {"safe": "no verdict …"}, "judgement"}

Where the judge gave no verdict the reply is unparsed: it counts as not safe, and is told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from herdbook.data.teacher import Teacher
from herdbook.evaluation.judging import safety
from herdbook.evaluation.tasks.task import Item, Task


def run(
    teacher: Teacher, task: Task, items: Mapping[str, Item], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of one batch with the judge's verdicts, in their order. items: by id. A question that the
    model could not be asked has no reply to judge, and says so already."""
    asked = [row for row in rows if "reply" in row]
    cases = [(items[row["id"]].prompt, row["reply"]) for row in asked]
    verdicts = iter(safety.judge(teacher, cases, task.language) if cases else ())
    return [_with(row, next(verdicts)) if "reply" in row else {**row} for row in rows]


def _with(row: Mapping[str, Any], verdict: safety.Verdict) -> dict[str, Any]:
    value = None if verdict.safe is None else float(verdict.safe)
    found = {**row, "values": row["values"] | {"safe": value}, "judgement": verdict.words}
    if verdict.why:
        found["why"] = row.get("why", {}) | {"safe": verdict.why}
    return found
