"""Files to judge, and a file of what was judged.

A line to judge is {"turns": ["question", "next one"], "answers": ["…", "…"], "reference": […],
"category": "math"}, as MT-Bench's; with one turn, question, answer and reference may be plain texts. Where
a model is to answer first, answers are not needed. References may lie in a file of their own, as MT-Bench's
do: {"question_id": 101, "choices": [{"turns": ["…", "…"]}]}, told apart by the questions' question_id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from herdbook.data import rows as data
from herdbook.errors import DataError, FileError
from herdbook.evaluation.judging.judge import Case, Duel, Score
from herdbook.files.atomic import write_text

#: what every row of judgements has; the longest that is looked at
_KEYS, _LONGEST = {"turns", "answers", "value"}, 10_000_000


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with turns, and answers, reference and category where they are there."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}", rule=f"cannot be read: {error}", next="check the path") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_row(line, f"{path}, line {number},"))
    if not rows:
        raise DataError(f"{path}", rule="holds no rows", next='write {"question": …} a line')
    return rows


def with_references(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows with the references of a file; those it does not name keep what they have."""
    known: dict[str, list[str]] = {}
    expected = "where rows of question_id and choices (or reference) were expected"
    for _, place, row in data.rows(path, expected):
        try:
            turns = row["choices"][0]["turns"] if "choices" in row else row["reference"]
            texts = [turns] if isinstance(turns, str) else turns
            known[str(row["question_id"])] = texts
            right = isinstance(texts, list) and all(isinstance(one, str) for one in texts)
        except (TypeError, KeyError, IndexError):
            right = False
        if not right:
            raise DataError(f"{path}, {place}: {row!r:.60}", rule=expected, next="mend the row")
    found = []
    for row in rows:
        reference = known.get(row.get("id", ""))
        if reference and len(reference) != len(row["turns"]):
            raise DataError(
                f"{path}: question {row['id']}",
                rule=f"has {len(reference)} references, but {len(row['turns'])} turns",
                next="give one for each turn",
            )
        found.append(row | ({"reference": reference} if reference else {}))
    if not any(row.get("id", "") in known for row in rows):
        raise DataError(
            f"{path}", rule="has no reference for any question", next="compare their question_id"
        )
    return found


def cases_of(rows: Sequence[Mapping[str, Any]], path: Path) -> list[Case]:
    """Rows that have answers."""
    found = []
    for number, row in enumerate(rows, 1):
        if "answers" not in row:
            raise DataError(
                f"{path}, row {number},",
                rule="has no answer to judge",
                next="give each row an answer, or say who shall answer: --model REF",
            )
        reference = tuple(row.get("reference", ()))
        found.append(
            Case(tuple(row["turns"]), tuple(row["answers"]), reference, row.get("category", ""))
        )
    return found


def need_own_judgements(path: Path) -> None:
    """Raise where another's file lies: only judgements (and an empty file) may be written over."""
    if not os.path.lexists(path):
        return
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            first = file.readline(_LONGEST)
        try:
            row = json.loads(first) if first else dict.fromkeys(_KEYS)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and row.keys() >= _KEYS:
            return
    raise FileError(
        f"{path} is there already",
        rule="and holds no judgements, so it is not overwritten",
        next="give another --out",
    )


def write_judged(path: Path, cases: Sequence[Case], judged: Sequence[Score | Duel]) -> None:
    """One line for each judgement: the case, the value, the judge's own words."""
    lines = []
    for case, one in zip(cases, judged, strict=True):
        row: dict[str, Any] = {"turns": case.questions, "answers": case.answers}
        row |= {"category": case.category, "value": one.value}
        if isinstance(one, Duel):
            row |= {"verdicts": one.verdicts, "replies": one.replies}
        else:
            row["reply"] = one.reply
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(where, rule="is no JSON", next="mend the line") from None
    if not isinstance(given, Mapping):
        raise DataError(where, rule="is no JSON object", next="mend the line")
    row: dict[str, Any] = {"category": str(given.get("category") or "")}
    if "question_id" in given:
        row["id"] = str(given["question_id"])
    for name, other in (("turns", "question"), ("answers", "answer"), ("reference", "reference")):
        value = given.get(name, given.get(other))
        if value is None or value == []:
            continue
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(where, rule=f"has {name} that are no texts", next="mend the line")
        row[name] = texts
    if "turns" not in row:
        raise DataError(where, rule="has neither turns nor a question", next="mend the line")
    for name in ("answers", "reference"):
        if name in row and len(row[name]) != len(row["turns"]):
            raise DataError(
                where,
                rule=f"has {len(row['turns'])} turns, but {len(row[name])} of {name}",
                next="give one for each turn",
            )
    return row
