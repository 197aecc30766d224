"""A task's rows, as they stand in its file: each is checked, and one that cannot be used refuses the
file, by its line."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herdbook.data import rows as data
from herdbook.errors import DataError
from herdbook.evaluation.tasks.task import GIVEN, LETTERS, Task, columns


@dataclass(frozen=True)
class Row:
    """One row of a file, checked."""

    id: str
    group: str
    options: tuple[str, ...]
    right: tuple[int, ...]
    answer: str
    plain: Mapping[str, Any]


def read(task: Task, path: Path, more: frozenset[str] = frozenset()) -> list[Row]:
    """The rows of a task's file. more: columns that they need besides those of the task."""
    needed = task.needs() | more
    expected = f"where rows with {', '.join(sorted(needed))} were expected"
    found = []
    for number, (_, place, row) in enumerate(data.rows(path, expected), start=1):
        found.append(Reader(task, path, place).row(row, number, needed))
    if not found:
        raise DataError(f"{path} holds no row", rule=expected, next="give another file")
    return found


@dataclass(frozen=True)
class Reader:
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

    def row(self, row: Any, number: int, needed: set[str]) -> Row:
        task = self.task
        if not isinstance(row, Mapping):
            raise self.wrong(f"{row!r:.60}", "is no object, where one row was expected")
        if missing := sorted(needed - row.keys()):
            raise self.wrong(
                f"a row with the keys {{{', '.join(map(str, row))}}}", f"lacks {missing[0]!r}"
            )
        for name in columns(task.prompt, task.name) - GIVEN:
            value = row[name]
            deeper = f"{name}." in task.prompt or f"{name}[" in task.prompt
            if value is None or value == "" or (isinstance(value, Mapping) and not deeper):
                raise self.wrong(f"{name} is {value!r:.60}", "where a text was expected")
        options, right = self.options(row) if task.options else ((), ())
        return Row(
            id=self.word(row, task.id) if task.id else str(number),
            group=self.word(row, task.group) if task.group else "",
            options=options,
            right=right,
            answer="" if right or not task.answer else self.word(row, task.answer),
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
