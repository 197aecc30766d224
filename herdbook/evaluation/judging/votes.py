"""The log of an arena: one vote a line, only ever appended to.

    {"model_a": "cria@2", "model_b": "smollm2", "winner": "model_a", "anonymous": true}

`winner` is model_a, model_b or tie; `model_a` is what stood first, or left. `anonymous` says that who
voted did not see the names: others are counted and left out. Optional: `length_a`, `length_b` (of the
replies, in one unit), `question`, `time`, and what else one likes to keep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herdbook.errors import DataError

WINNERS = ("model_a", "model_b", "tie")


@dataclass(frozen=True)
class Vote:
    model_a: str
    model_b: str
    winner: str
    anonymous: bool = True
    length_a: float | None = None
    length_b: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_json(cls, row: Any, where: str = "vote") -> Vote:
        """Errors: DataError names `where` and what is wrong."""
        if not isinstance(row, dict):
            raise _wrong(where, "is no JSON object")
        for name in ("model_a", "model_b"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise _wrong(where, f"has no {name}")
        if row["model_a"] == row["model_b"]:
            raise _wrong(where, f"lets {row['model_a']!r} meet itself")
        if row.get("winner") not in WINNERS:
            raise _wrong(
                where, f"has winner {row.get('winner')!r}, not one of {', '.join(WINNERS)}"
            )
        if not isinstance(row.get("anonymous"), bool):
            raise _wrong(where, "does not say whether it was anonymous (true or false)")
        lengths = [row.get(name) for name in ("length_a", "length_b")]
        if lengths != [None, None] and not all(
            isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < 1e12
            for n in lengths
        ):
            raise _wrong(
                where, f"has lengths {lengths}: both are numbers from 0, or neither is there"
            )
        known = {name for name in cls.__dataclass_fields__ if name != "extra"}
        extra = {name: value for name, value in row.items() if name not in known}
        return cls(**{name: row[name] for name in known if name in row}, extra=extra)

    def to_json(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        return {name: value for name, value in row.items() if value is not None} | dict(self.extra)


@dataclass(frozen=True)
class Votes:
    """What a log holds: the anonymous votes in their order, and how many were not."""

    votes: tuple[Vote, ...]
    named: int = 0


def append(path: Path, vote: Vote) -> None:
    """Add a vote: one write to the file's end, on disk before this returns."""
    row = vote.to_json()
    Vote.from_json(row)
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                raise _wrong(f"{path}", "ends in the middle of a line")
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Votes:
    """All votes of a log. Errors: DataError names the first line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}", rule=f"cannot be read: {error}", next="herd arena votes.jsonl"
        ) from None
    votes, named = [], 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise _wrong(f"{path}, line {number},", "is no JSON") from None
        vote = Vote.from_json(row, f"{path}, line {number},")
        if vote.anonymous:
            votes.append(vote)
        else:
            named += 1
    return Votes(tuple(votes), named)


def _wrong(where: str, rule: str) -> DataError:
    return DataError(where, rule=rule, next="mend or remove that line; no other is touched")
