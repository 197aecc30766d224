"""`herd eval REF --task …` and `herd compare A B`: reports, made or found in the book."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from herdbook.book.book import Artifact, Book
from herdbook.errors import ConfigError, UnknownName
from herdbook.evaluation.report import Report
from herdbook.evaluation.tasks.step import Evaluate, read, report_name
from herdbook.model.fetch import Fetch
from herdbook.model.references import resolve
from herdbook.progress import for_terminal


def run(
    ref: str,
    tasks: Sequence[str],
    book: Book,
    *,
    limit: int = 0,
    shots: int | None = None,
    seeds: tuple[int, ...] = (0,),
    chat: bool = False,
) -> list[tuple[Artifact, dict[str, Any]]]:
    """The report of each task with its figures.

    ref: any reference to a model; one from outside is entered into the book first, so that the report
    has its parent. All tasks are checked before the first is asked.
    """
    asked = [Evaluate(ref, one, limit, shots, seeds, chat) for one in tasks]
    for step in asked:
        step.check()
    artifact = entered(ref, book)
    reports = []
    for task in tasks:
        step = Evaluate(artifact.id, task, limit, shots, seeds, chat)
        report = step.run(book, name=report_name(artifact, task), progress=for_terminal())
        reports.append((report, read(report)))
    return reports


def entered(ref: str, book: Book) -> Artifact:
    """The model or adapter behind a reference in the book; one from outside is entered into it first."""
    artifact = book.find(ref)
    if artifact is None:
        resolve(ref, book)  # names that are like it, where there is none
        artifact = Fetch(ref).run(book, progress=for_terminal())
    if artifact.kind not in ("model", "adapter"):
        raise UnknownName(
            f"{ref!r} is of the kind {artifact.kind}",
            rule="where a model or an adapter is wanted",
            next="see `herd list`",
        )
    return artifact


def compare(
    before: str, after: str, book: Book, *, tasks: Sequence[str], limit: int, text: str
) -> Artifact:
    """The report of two models side by side, made or found in the book; no gate can break."""
    step = Report(
        before, after, text=text, tasks=tuple(tasks), limit=limit,
        max_perplexity_increase=0, min_identity=0,
    )  # fmt: skip
    step.check()
    sides = [entered(one, book) for one in (before, after)]
    if sides[0].id == sides[1].id:
        raise ConfigError(
            f"{before!r} and {after!r}",
            rule="are one and the same model",
            next="name another (see: herd list)",
        )
    family = {one.id: one for side in sides for one in [side, *book.ancestors(side)]}
    data = tuple(one.id for one in family.values() if one.kind == "dataset")
    step = replace(step, before=sides[0].id, after=sides[1].id, data=data)
    return step.run(book, name=f"{sides[1].name}-compare", progress=for_terminal())


def read_report(report: Artifact) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((report.path / "report.json").read_text(encoding="utf-8"))
    return found
