"""`herd eval REF --task …`, `… --suite health` and `herd compare A B`: reports, made or found in the
book."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from herdbook.book.book import Artifact, Book
from herdbook.errors import ConfigError, UnknownName
from herdbook.evaluation.health import Health, result_of
from herdbook.evaluation.judging.teachers import is_url
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
    judge: str = "",
    judge_name: str = "",
) -> list[tuple[Artifact, dict[str, Any]]]:
    """The report of each task with its figures.

    ref: any reference to a model; one from outside is entered into the book first, so that the report
    has its parent. judge: a reference or a URL, judge_name the model's name there; for the tasks that need
    one. All tasks are checked before the first is asked.
    """
    how = {"judge_url" if is_url(judge) else "judge": judge, "judge_name": judge_name}
    asked = [Evaluate(ref, one, limit, shots, seeds, chat, **how) for one in tasks]
    without = [step.for_its_task() for step in asked]
    if any(step.judge or step.judge_url for step in without):
        asked = without  # else a judge that is given has nothing to judge, and is refused
    for step in asked:
        step.check()
    artifact = entered(ref, book)
    judging = entered(judge, book).id if any(step.judge for step in asked) else ""
    reports = []
    for step in asked:
        step = replace(step, model=artifact.id, judge=judging if step.judge else "")
        name = report_name(artifact, step.task)
        report = step.run(book, name=name, progress=for_terminal())
        reports.append((report, read(report)))
    return reports


def health(
    ref: str, book: Book, *, prompts: str = "", limit: int = 0, samples: int = 3
) -> tuple[Artifact, dict[str, Any]]:
    """The report on a model's health with its figures; prompts: a user's file."""
    step = Health(ref, prompts, limit, samples)
    step.check()
    artifact = entered(ref, book)
    step = replace(step, model=artifact.id)
    report = step.run(book, name=f"{artifact.name}-health", progress=for_terminal())
    return report, result_of(report)


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
