"""From a task's files to its items. Every row is read before one is asked."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from herdbook.book.hashing import digest
from herdbook.data import rows as data
from herdbook.errors import ConfigError, DataError
from herdbook.evaluation.tasks.rows import Reader, Row
from herdbook.evaluation.tasks.rows import read as read_rows
from herdbook.evaluation.tasks.task import GIVEN, LETTERS, Group, Item, Task, columns, read
from herdbook.files.atomic import sha256_once

#: what ends in these is a user's rows, or a user's text
ROWS, TEXTS = (".jsonl", ".json", ".jsonl.gz", ".json.gz"), (".txt", ".md", ".txt.gz")


@dataclasses.dataclass(frozen=True)
class Questions:
    """The items of a task, and hashes of what they were made of."""

    items: list[Item]
    total: int  # in the file
    data_hash: str
    prompt_hash: str


def find(ref: str) -> Task | Group:
    """What the user calls a task: a shipped one, a .yaml, rows of questions, or a text."""
    path = Path(ref).expanduser()
    if ref.endswith(ROWS):
        return users(path)
    if ref.endswith(TEXTS):
        return text(path)
    return read(ref)


def hashes(task: Task) -> dict[str, str]:
    """Of the task's files."""
    names = [task.data, *([task.shots_data] if task.shots else [])]
    return {name: sha256_once(task.file(name)) for name in names}


def questions(task: Task, limit: int = 0) -> Questions:
    """Every item of the task; with a limit so many, spread evenly over the file.

    Of a text, each document is an item, and the limit is the scorer's (scoring.py).
    """
    path = task.file(task.data)
    if task.kind == "text":
        texts = _documents(task, path)
        return Questions(texts, len(texts), digest(hashes(task)), digest(task.asked()))
    rows = read_rows(task, path)
    pool = sorted({one for row in rows for one in row.options}) if task.pool else []
    shots = _Shots(task)
    _unique([row.id for row in rows], path)
    some = limit if 0 < limit < len(rows) else len(rows)
    picked = [rows[place * len(rows) // some] for place in range(some)]
    items = [_item(task, row, shots, pool) for row in picked]
    told = {"task": task.asked(), "examples": shots.written({row.group for row in rows})}
    return Questions(items, len(rows), digest(hashes(task)), digest(told))


def _documents(task: Task, path: Path) -> list[Item]:
    """The whole of a text file, or `text` of each row."""
    if not path.name.endswith(ROWS):
        return [_document("1", data.text(path, "where a text was expected"))]
    found = []
    rows = data.rows(path, "where rows with text were expected")
    for number, (_, place, row) in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not isinstance(row.get("text"), str) or not row["text"]:
            raise Reader(task, path, place).wrong(f"{row!r:.60}", "lacks a text")
        found.append(_document(str(number), row["text"]))
    return found


def _document(id: str, text: str) -> Item:
    return Item(id, group="", intro="", shots=(), prompt=text, delimiter="")


class _Shots:
    """The examples of each group, written out once."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows: list[Row] = []
        if task.shots:
            self.path = task.file(task.shots_data)
            if self.path.samefile(task.file(task.data)):
                raise ConfigError(
                    f"task {task.name}: shots_data {task.shots_data}",
                    rule="is the file of the questions, so a question would be its own example",
                    next="take the examples from another file",
                )
            plain = dataclasses.replace(task, id="", group=task.group if self.grouped else "")
            self.rows = read_rows(plain, self.path, columns(task.target, task.name) - GIVEN)
        self._of: dict[str, tuple[tuple[str, str], ...]] = {}

    @property
    def grouped(self) -> bool:
        return self.task.shots_by_group

    def of(self, group: str) -> tuple[tuple[str, str], ...]:
        key = group if self.grouped else ""
        if key not in self._of:
            some = [row for row in self.rows if row.group == key][: self.task.shots]
            if len(some) < self.task.shots:
                raise DataError(
                    f"{self.path} holds {len(some)} examples{f' of {key}' if key else ''}",
                    rule=f"where {self.task.shots} are asked for",
                    next=f"herd eval … --shots {len(some)}",
                )
            self._of[key] = tuple(
                (_prompt(self.task, row), self.task.delimiter + _target(self.task, row))
                for row in some
            )
        return self._of[key]

    def written(self, groups: Collection[str]) -> dict[str, Any]:
        for group in groups:
            self.of(group)
        return {key: [list(one) for one in some] for key, some in sorted(self._of.items())}


def _words(task: Task, row: Row) -> dict[str, Any]:
    """What a template sees."""
    group = task.names.get(row.group, row.group.replace("_", " "))
    return {**row.plain, "group": group, "options": row.options, "letters": LETTERS}


def _prompt(task: Task, row: Row) -> str:
    return task.fill("prompt", _words(task, row))


def _choices(task: Task, row: Row) -> tuple[str, ...]:
    return tuple(LETTERS[: len(row.options)]) if task.scored == "letter" else row.options


def _target(task: Task, row: Row) -> str:
    return task.fill("target", _words(task, row)) if task.target else _answer(task, row)


def _answer(task: Task, row: Row) -> str:
    return _choices(task, row)[row.right[0]] if row.right else row.answer


def _item(task: Task, row: Row, shots: _Shots, pool: Sequence[str]) -> Item:
    if task.pool:
        row = _filled(task, row, pool)
    return Item(
        id=row.id,
        group=row.group,
        intro=task.fill("intro", _words(task, row)),
        shots=shots.of(row.group),
        prompt=_prompt(task, row),
        delimiter=task.delimiter,
        choices=_choices(task, row),
        right=row.right,
        answer=_answer(task, row),
        extra=row.plain,
    )


def _filled(task: Task, row: Row, pool: Sequence[str]) -> Row:
    """The row with options of other rows, `task.pool` in all, in an order of its own."""
    own = dict.fromkeys(row.options)
    if len(pool) < task.pool:
        raise ConfigError(
            f"task {task.name}: {len(pool)} different options in the file",
            rule=f"where {task.pool} are put before each question",
            next="give the whole file",
        )
    dice = random.Random(f"{task.version}:{row.id}:{'|'.join(own)}")
    drawn = [one for one in dice.sample(pool, task.pool) if one not in own]
    options = [*own, *drawn[: task.pool - len(own)]]
    right = {row.options[place] for place in row.right}
    dice.shuffle(options)
    places = tuple(place for place, one in enumerate(options) if one in right)
    return dataclasses.replace(row, options=tuple(options), right=places)


def _unique(ids: Sequence[str], path: Path) -> None:
    seen: dict[str, int] = {}
    for number, id in enumerate(ids, start=1):
        if id in seen:
            raise DataError(
                f"{path}, row {number}: id {id!r}",
                rule=f"is row {seen[id]}'s already",
                next="give each row an id of its own, or none",
            )
        seen[id] = number


# ---------------------------------------------------------------------------------- a user's files

_LISTED = "{% for one in options %}{{ letters[loop.index0] }}. {{ one }}\n{% endfor %}"


def users(path: Path) -> Task:
    """A file of {question, answer}, or of {question, answer} with choices, or A, B, C …

    Choices are scored by likelihood. Other answers are generated and compared: `exact` is equality but
    for case, white space and punctuation at the ends; `contains` looks for the answer in the reply.
    """
    expected = "where rows of question and answer (and choices, or A, B, …) were expected"
    _, place, first = next(data.rows(path, expected), (0, "", None))
    if not isinstance(first, Mapping) or "question" not in first or "answer" not in first:
        found = f"{path}, {place}: {first!r:.60}" if place else f"{path} holds no row"
        raise DataError(found, rule=expected, next='write {"question": "…", "answer": "…"} a line')
    named: list[str] = []
    while len(named) < len(LETTERS) and LETTERS[len(named)] in first:
        named.append(LETTERS[len(named)])
    options: Any = "choices" if "choices" in first else named
    chinese = any("\u4e00" <= one <= "\u9fff" for one in str(first["question"]))
    asks, says, blank = ("问题：", "答案：", "") if chinese else ("Question: ", "Answer:", " ")
    common: dict[str, Any] = {
        "name": path.name.partition(".")[0],
        "about": {"en": f"{path.name}, your own", "zh": f"您自己的 {path.name}"},
        "version": 1,
        "data": str(path.absolute()),
        "id": "id" if "id" in first else "",
        "group": "group" if "group" in first else "",
        "delimiter": blank,
    }
    if options:
        prompt = "{{ question }}\n" + _LISTED + says
        return Task(
            kind="choice", prompt=prompt, options=options, metrics=("acc", "acc_bytes"), **common
        )
    return Task(
        kind="generate",
        prompt=asks + "{{ question }}\n" + says,
        metrics=("exact", "contains"),
        max_tokens=64,
        stop=("\n",),
        **common,
    )


def text(path: Path) -> Task:
    """A text whose every token is scored."""
    return Task(
        name=path.name.partition(".")[0],
        about={"en": f"{path.name}, your own", "zh": f"您自己的 {path.name}"},
        version=1,
        kind="text",
        data=str(path.absolute()),
        metrics=("bits_per_byte", "perplexity"),
    )
