"""A conversation, and the files in which datasets keep them.

One line of a dataset file (``train.jsonl``, UTF-8, a line ends at "\\n" and nowhere else)::

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

Every other key of the line is kept in `Conversation.extra`: `line` (where it stood in a user's file),
`language`, `ask`, `expect`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herdbook.errors import DataError
from herdbook.files.atomic import write_text

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


def dump(rows: Iterable[Conversation]) -> str:
    return "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, rows: Iterable[Conversation]) -> None:
    """Write a dataset file, whole or not at all."""
    write_text(path, dump(rows))


def read(path: Path) -> list[Conversation]:
    """The conversations of a dataset file that a step wrote (foreign files: `formats.read`)."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            rows.append(Conversation.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: {line[:80]}",
                rule="is no conversation as Herdbook writes them",
                next="run herd verify, or read a file of your own with --data FILE",
            ) from error
    return rows
