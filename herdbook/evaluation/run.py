"""`herd eval REF --task …`: each task's report, made or found in the book."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from herdbook.book.book import Artifact, Book
from herdbook.errors import UnknownName
from herdbook.evaluation.evaluating import Evaluate, read, report_name
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
    progress = for_terminal()
    artifact = book.find(ref)
    if artifact is None:
        resolve(ref, book)  # names that are like it, where there is none
        artifact = Fetch(ref).run(book, progress=progress)
    if artifact.kind not in ("model", "adapter"):
        raise UnknownName(
            f"{ref!r} is of the kind {artifact.kind}",
            rule="where a model or an adapter is wanted",
            next="see `herd list`",
        )
    reports = []
    for task in tasks:
        step = Evaluate(artifact.id, task, limit, shots, seeds, chat)
        report = step.run(book, name=report_name(artifact, task), progress=progress)
        reports.append((report, read(report)))
    return reports
