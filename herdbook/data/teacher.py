"""A teacher answers. Data generation needs text from a model, yet lives below the engine; so it is
handed one of these instead of importing it.

The local engine is a teacher (`LoadedModel.as_teacher()`), any server can be one, and tests script
one. What a teacher owes:

- answers come in the order of the asks;
- at temperature 0 the answers depend on the asks of this one call alone, not on calls before it (a
  local engine forgets its prefix cache between calls): then a killed run that goes on with a fresh
  teacher gets the same bytes;
- `finished` says whether the model ended its turn by itself. An answer cut at `max_tokens` must not
  be trained to end there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from herdbook.data.records import Message


@dataclass(frozen=True)
class Ask:
    """One conversation that waits for its next assistant turn."""

    messages: tuple[Message, ...]
    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    text: str
    finished: bool = True  # False: cut at max_tokens


class Teacher(Protocol):
    def generate(self, asks: Sequence[Ask], /) -> list[Answer]: ...


@dataclass
class ScriptedTeacher:
    """A teacher that answers by a function of the ask, and remembers how often it was called.

    >>> ScriptedTeacher(lambda ask: Answer("Paris.")).generate([Ask((Message("user", "?"),))])
    [Answer(text='Paris.', finished=True)]
    """

    script: Callable[[Ask], Answer]
    calls: int = 0

    def generate(self, asks: Sequence[Ask], /) -> list[Answer]:
        self.calls += 1
        return [self.script(ask) for ask in asks]
