"""Conversations and documents, and the files in which datasets keep them.

One line of a dataset file (``train.jsonl``, UTF-8, a line ends at "\\n" and nowhere else) is one of::

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"text": "Four score and seven years ago our fathers brought forth …"}

Every other key of the line is kept in `extra`: `line` (where it stood in a user's file), `language`,
`ask`, `expect`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herdbook.errors import DataError
from herdbook.files.atomic import replacing

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str  # one of ROLES
    content: str

    def to_json(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, *turns: str, system: str = "", **extra: Any) -> Conversation:
        """User and assistant by turns: ``Conversation.of("Hi", "Hello!")``."""
        start = (Message("system", system),) if system else ()
        roles = ("user", "assistant")
        return cls(
            start + tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns)), extra
        )

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Conversation:
        messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
        return cls(messages, {k: v for k, v in row.items() if k != "messages"})

    def to_json(self) -> dict[str, Any]:
        return {"messages": [message.to_json() for message in self.messages], **self.extra}


@dataclass(frozen=True)
class Document:
    """Plain text, of which every word is learnt."""

    text: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Document:
        return cls(str(row["text"]), {k: v for k, v in row.items() if k != "text"})

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, **self.extra}


def line(row: Conversation | Document) -> str:
    return json.dumps(row.to_json(), ensure_ascii=False) + "\n"


def write(path: Path, rows: Iterable[Conversation | Document]) -> None:
    """Write a dataset file, a row at a time, whole or not at all."""
    with replacing(path) as new, new.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(line, rows))


def stream(path: Path) -> Iterator[Conversation | Document]:
    """The rows of a dataset file that a step wrote, one at a time (foreign files: `formats.read`)."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(file, start=1):
            if text == "\n":
                continue
            try:
                row = json.loads(text)
                yield (Document if "text" in row else Conversation).from_json(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path}, line {number}: {text[:80].rstrip()}",
                    rule="is no row as Herdbook writes them",
                    next="run herd verify, or read a file of your own with --data FILE",
                ) from error


def read(path: Path) -> list[Conversation]:
    """The conversations of a dataset file; DataError where it holds documents."""
    rows = list(stream(path))
    for row in rows:
        if isinstance(row, Document):
            raise DataError(
                f"{path}: {row.text[:60]!r}",
                rule="is a document, where conversations were expected",
                next="give a dataset of conversations (step Import)",
            )
    return [row for row in rows if isinstance(row, Conversation)]
