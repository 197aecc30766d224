"""From a task's files to its items: every row is read before one is asked, and a row that cannot be
used refuses the file, by its line."""

from __future__ import annotations

import ast
import dataclasses
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from herdbook.book.hashing import digest
from herdbook.data import formats
from herdbook.errors import ConfigError, DataError
from herdbook.evaluation.task import GIVEN, LETTERS, Group, Item, Task, columns, read
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
    rows = _rows(task, path)
    pool = sorted({one for row in rows for one in row.options}) if task.pool else []
    shots = _Shots(task)
    _unique([row.id for row in rows], path)
    picked = range(len(rows))
    if 0 < limit < len(rows):
        picked = [place * len(rows) // limit for place in range(limit)]  # type: ignore[assignment]
    items = [_item(task, rows[place], shots, pool) for place in picked]
    told = {"task": task.asked(), "examples": shots.written({row.group for row in rows})}
    return Questions(items, len(rows), digest(hashes(task)), digest(told))


@dataclasses.dataclass(frozen=True)
class _Row:
    """A checked row."""

    id: str
    group: str
    options: tuple[str, ...]
    right: tuple[int, ...]
    answer: str
    plain: Mapping[str, Any]


def _rows(task: Task, path: Path, more: frozenset[str] = frozenset()) -> list[_Row]:
    needed = task.needs() | more
    expected = f"where rows with {', '.join(sorted(needed))} were expected"
    found = []
    for number, (_, place, row) in enumerate(formats.rows(path, expected), start=1):
        found.append(_Reader(task, path, place).row(row, number, needed))
    if not found:
        raise DataError(f"{path} holds no row", rule=expected, next="give another file")
    return found


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads one row, and knows how to say where it is."""

    task: Task
    path: Path
    place: str

    def wrong(self, found: str, rule: str) -> DataError:
        return DataError(
            f"{self.path}, {self.place}: {found}",
            rule=rule,
            next="mend or take out that row; nothing was asked yet",
        )

    def row(self, row: Any, number: int, needed: set[str]) -> _Row:
        task = self.task
        if not isinstance(row, Mapping):
            raise self.wrong(f"{row!r:.60}", "is no object, where one row was expected")
        if missing := sorted(needed - row.keys()):
            raise self.wrong(
                f"a row with the keys {{{', '.join(map(str, row))}}}", f"lacks {missing[0]!r}"
            )
        options, right = self.options(row) if task.options else ((), ())
        return _Row(
            id=self.word(row, task.id) if task.id else str(number),
            group=self.word(row, task.group) if task.group else "",
            options=options,
            right=right,
            answer="" if right else self.word(row, task.answer),
            plain=row,
        )

    def pick(self, row: Mapping[str, Any], path: str) -> Any:
        """The value of column a, or of b in column a where the path is a.b; of a template, its text."""
        if "{" in path:
            return self.task.rendered(path, row, "answer")
        value: Any = row
        for part in path.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise self.wrong(f"{value!r:.60}", f"lacks {part!r} (of {path})")
            value = value[part]
        return value

    def word(self, row: Mapping[str, Any], path: str) -> str:
        value = self.pick(row, path)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.wrong(f"{path} is {value!r:.60}", "where text or a number was expected")
        if not str(value).strip():
            raise self.wrong(f"{path} is empty", "where text was expected")
        return str(value)

    def options(self, row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The options' texts, and the places of the right ones."""
        task = self.task
        value: Any
        labels: Any = None
        if isinstance(task.options, str) and "{" in task.options:
            written = task.rendered(task.options, row, "options")
            try:
                value = ast.literal_eval(written)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise self.wrong(f"the options {written!r:.60}", "are no list") from None
        elif isinstance(task.options, str):
            value = self.pick(row, task.options)
            if isinstance(value, Mapping) and value.keys() == {"choices", "labels"}:
                value, labels = value["choices"], value["labels"]
            elif isinstance(value, Mapping):  # {text: 1 or 0}
                value, labels = list(value), list(value.values())
            elif isinstance(value, str):
                value = value.split("\n")
        else:
            value = [self.pick(row, one) for one in task.options]
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < 2:
            raise self.wrong(f"the options are {value!r:.60}", "where two or more were expected")
        for place, one in enumerate(value, start=1):
            if isinstance(one, bool) or not isinstance(one, str | int | float):
                raise self.wrong(f"option {place} is {one!r:.60}", "where text was expected")
            if not str(one).strip():
                raise self.wrong(f"option {place} of {len(value)} is empty", "and cannot be chosen")
        if task.scored == "letter" and len(value) > len(LETTERS):
            raise self.wrong(f"{len(value)} options", f"are more than {len(LETTERS)} letters")
        options = tuple(map(str, value))
        if task.answer_is == "labels":
            labels = self.pick(row, task.answer) if labels is None else labels
            if not isinstance(labels, list) or len(labels) != len(options) or 1 not in labels:
                raise self.wrong(
                    f"the labels are {labels!r:.60}",
                    f"where 0 or 1 for each of {len(options)} options, one 1 at least, was expected",
                )
            return options, tuple(place for place, one in enumerate(labels) if one == 1)
        return options, (self.right(self.pick(row, task.answer), options),)

    def right(self, answer: Any, options: tuple[str, ...]) -> int:
        """The place of the option that the answer names."""
        kind, letters = self.task.answer_is, LETTERS[: len(options)]
        if "{" in self.task.answer:  # a template writes a number or an option
            answer = answer.strip()
            kind, answer = ("number", int(answer)) if answer.isdecimal() else ("text", answer)
        places = set()
        if kind in ("any", "number") and isinstance(answer, int) and not isinstance(answer, bool):
            places |= {answer} & set(range(len(options)))
        word = answer.strip() if isinstance(answer, str) else ""
        if kind in ("any", "letter") and len(word) == 1 and word in letters:
            places.add(letters.index(word))
        if kind in ("any", "text"):
            places |= {place for place, one in enumerate(options) if one == str(answer)}
        if len(places) == 1:
            return places.pop()
        if places:
            raise self.wrong(
                f"answer {answer!r:.60}", "may mean several options; give the number, from 0"
            )
        named = {"letter": f"a letter of {letters}", "text": "an option's text"}
        named["number"] = f"a number from 0 to {len(options) - 1}"
        raise self.wrong(
            f"answer {answer!r:.60}",
            f"is none of the {len(options)} options; it must be "
            + named.get(kind, f"{named['letter']}, an option's text, or {named['number']}"),
        )


def _documents(task: Task, path: Path) -> list[Item]:
    """The whole of a text file, or `text` of each row."""
    rows = [("1", formats.text(path, "where a text was expected"))]
    if path.name.endswith(ROWS):
        expected = "where rows with text were expected"
        rows = []
        for number, (_, place, row) in enumerate(formats.rows(path, expected), start=1):
            if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
                raise _Reader(task, path, place).wrong(f"{row!r:.60}", "lacks a text")
            rows.append((str(number), row["text"]))
    return [Item(id, "", "", (), body, "") for id, body in rows]


class _Shots:
    """The examples of each group, written out once."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows: list[_Row] = []
        if task.shots:
            self.path = task.file(task.shots_data)
            plain = dataclasses.replace(task, id="", group=task.group if self.grouped else "")
            self.rows = _rows(plain, self.path, columns(task.target, task.name) - GIVEN)
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


def _words(task: Task, row: _Row) -> dict[str, Any]:
    """What a template sees."""
    group = task.names.get(row.group, row.group.replace("_", " "))
    return {**row.plain, "group": group, "options": row.options, "letters": LETTERS}


def _prompt(task: Task, row: _Row) -> str:
    return task.fill("prompt", _words(task, row))


def _choices(task: Task, row: _Row) -> tuple[str, ...]:
    return tuple(LETTERS[: len(row.options)]) if task.scored == "letter" else row.options


def _target(task: Task, row: _Row) -> str:
    return task.fill("target", _words(task, row)) if task.target else _answer(task, row)


def _answer(task: Task, row: _Row) -> str:
    return _choices(task, row)[row.right[0]] if row.right else row.answer


def _item(task: Task, row: _Row, shots: _Shots, pool: Sequence[str]) -> Item:
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


def _filled(task: Task, row: _Row, pool: Sequence[str]) -> _Row:
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
    right = {options[place] for place in row.right}
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
    _, place, first = next(formats.rows(path, expected), (0, "", None))
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
