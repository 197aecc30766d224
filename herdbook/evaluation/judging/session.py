"""A run of `herd judge`: answers, then judgements, kept as they come, so that a killed one goes on.

The work lies in the book's home until all is judged, under a key of all that decides it: another judge,
another file or other prompts begin anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from herdbook.book.hashing import digest
from herdbook.data.teacher import Teacher
from herdbook.evaluation.answered import Answered
from herdbook.evaluation.judging import judge
from herdbook.evaluation.judging.judge import Case, Duel, Score
from herdbook.progress import Progress

#: questions answered, or judgements made, at once
BATCH = 16

Row = dict[str, Any]


def key(**decides: Any) -> str:
    """Of a run: its files, models and settings, and what a judge is told."""
    return digest(decides | {"prompts": [judge.sections(one) for one in ("en", "zh")]})


def answers(
    opener: Callable[[], Teacher],
    rows: Sequence[Row],
    path: Path,
    progress: Progress,
    max_tokens: int,
) -> list[Case]:
    """A model's answers to rows of turns, MT-Bench's way (judge.answer_turns)."""
    teacher = functools.cache(opener)  # a run that goes on may not need it

    def answer(batch: Sequence[Row]) -> list[Row]:
        return [asdict(one) for one in judge.answer_turns(teacher(), batch, max_tokens)]

    return [_case(row) for row in Answered(path, _batches(rows)).fill(answer, progress, "answers")]


def scores(
    opener: Callable[[], Teacher],
    cases: Sequence[Case],
    language: str,
    path: Path,
    progress: Progress,
) -> list[Score]:
    teacher = functools.cache(opener)

    def answer(batch: Sequence[Case]) -> list[Row]:
        return [asdict(one) for one in judge.score(teacher(), batch, language)]

    rows = Answered(path, _batches(cases)).fill(answer, progress, "judged")
    return [Score(**row) for row in rows]


def duels(
    opener: Callable[[], Teacher],
    pairs: Sequence[tuple[Case, Case]],
    language: str,
    path: Path,
    progress: Progress,
) -> list[Duel]:
    teacher = functools.cache(opener)

    def answer(batch: Sequence[tuple[Case, Case]]) -> list[Row]:
        return [asdict(one) for one in judge.compare(teacher(), batch, language)]

    rows = Answered(path, _batches(pairs)).fill(answer, progress, "judged")
    return [
        Duel(**row | {"verdicts": tuple(row["verdicts"]), "replies": tuple(row["replies"])})
        for row in rows
    ]


def _batches(some: Sequence[Any]) -> list[Sequence[Any]]:
    return [some[n : n + BATCH] for n in range(0, len(some), BATCH)]


def _case(row: Mapping[str, Any]) -> Case:
    return Case(
        tuple(row["questions"]), tuple(row["answers"]), tuple(row["references"]), row["category"]
    )
