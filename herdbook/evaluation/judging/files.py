"""Files to judge, and a file of what was judged.

A line to judge is {"turns": ["question", "next one"], "answers": ["…", "…"], "reference": […],
"category": "math"}, as MT-Bench's; with one turn, question, answer and reference may be plain texts. Where
a model is to answer first, answers are not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from herdbook.errors import DataError
from herdbook.evaluation.judging.judge import Case, Duel, Score
from herdbook.files.atomic import write_text


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


def read_cases(path: Path) -> list[Case]:
    """Rows that have answers."""
    found = []
    for number, row in enumerate(read_rows(path), 1):
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


def write_judged(path: Path, cases: Sequence[Case], judged: Sequence[Score | Duel]) -> None:
    """One line for each judgement: the case, the value, the judge's own words."""
    lines = []
    for case, one in zip(cases, judged, strict=True):
        row: dict[str, Any] = {"turns": case.questions, "answers": case.answers, "value": one.value}
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
