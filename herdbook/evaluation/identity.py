"""Does the model know who it is? Asked in wordings that it was never trained on.

A reply is **right** when it affirms every name that the question asks for, and claims to be nobody
else. Decided clause by clause (a clause ends at punctuation), so that no judge is needed:

- an expected name is affirmed where a clause holds it with no negation before it: «I am Luna» does,
  «I am not Luna» does not;
- another assistant's or maker's name (ChatGPT, Hugging Face …) is a claim, unless the question
  brought it up and the clause denies it: asked «Are you ChatGPT?», «No, I am Luna. I am not
  ChatGPT.» is right, «I am ChatGPT, not Luna» is wrong.

An ordinary question («What is the capital of Japan?») is answered right when the reply names neither
the assistant nor its keeper.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from herdbook.data.identity import FOREIGN
from herdbook.data.records import Conversation
from herdbook.data.teacher import Ask, Teacher
from herdbook.evaluation.statistics import Interval, wilson

#: a right answer is one short sentence; the base's longer ones need not be heard to the end
MAX_TOKENS = 40

_CLAUSE = re.compile(r"[,.;:!?()\n。、—]|\bbut\b|而是|但")
_NEGATION = re.compile(r"\b(?:not|never|neither|nor|cannot)\b|n['’]t\b|不|没|非(?!常)|无关")
_APART = re.compile(
    r"\b(?:different|another|other|unlike|instead of|rather than)\b|不同|另一|其他|不一样"
)


@dataclass(frozen=True)
class Scored:
    """One question and its reply."""

    question: str
    language: str
    ask: str  # name, keeper, both; none: an ordinary question
    reply: str
    right: bool
    why: str = ""  # what is wrong

    def to_json(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.__dataclass_fields__}


def score(teacher: Teacher, rows: Sequence[Conversation]) -> list[Scored]:
    """Ask every held-out question, all in one batch, and judge the replies."""
    answers = teacher.generate([Ask(row.messages, MAX_TOKENS) for row in rows])
    scored = []
    for row, answer in zip(rows, answers, strict=True):
        question = row.messages[-1].content
        why = judge(question, answer.text, row.extra["expect"], row.extra.get("avoid", {}))
        scored.append(
            Scored(
                question, row.extra["language"], row.extra["ask"], answer.text.strip(), not why, why
            )
        )
    return scored


def judge(question: str, reply: str, expect: Mapping[str, str], avoid: Mapping[str, str]) -> str:
    """What is wrong with the reply; empty when it is right."""
    plain = _plain(reply)
    for word in avoid.values():
        if _mentions(plain, _plain(word)):
            return f"names {word}"
    if not expect:
        return ""
    marked, marks = _mark(plain, expect.values())
    clauses = _CLAUSE.split(marked)
    for key, wanted in expect.items():
        mark = marks[_plain(wanted)]
        holding = [clause for clause in clauses if mark in clause]
        if not holding:
            return f"does not give the {key}"
        if all(_NEGATION.search(clause.partition(mark)[0]) for clause in holding):
            return f"denies the {key}"
    asked, own = _plain(question), " ".join(map(_plain, expect.values()))
    for other in FOREIGN:
        word = _plain(other)
        if _mentions(own, word):
            continue
        for clause in clauses:
            at = _find(clause, word)
            if at is None:
                continue
            denied = _NEGATION.search(clause[:at]) or _APART.search(clause)
            if not (denied and _mentions(asked, word)):
                return f"speaks of {other}"
    return ""


def summary(scored: Sequence[Scored]) -> dict[str, Interval]:
    """Shares that are right: «en», «zh» of the questions about identity, «ordinary» of the others."""
    groups: dict[str, list[bool]] = {}
    for one in scored:
        groups.setdefault(one.language if one.ask != "none" else "ordinary", []).append(one.right)
    return {name: wilson(sum(right), len(right)) for name, right in groups.items()}


def _plain(text: str) -> str:
    """Full-width forms, case and white space levelled."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _pattern(word: str) -> re.Pattern[str]:
    """The word on its own: «meta» is not in «metal», but «luna» is in «我是luna»."""
    left = r"(?<![a-z0-9])" if word[0].isascii() and word[0].isalnum() else ""
    right = r"(?![a-z0-9])" if word[-1].isascii() and word[-1].isalnum() else ""
    return re.compile(left + re.escape(word) + right)


def _find(text: str, word: str) -> int | None:
    found = _pattern(word).search(text)
    return found.start() if found else None


def _mentions(text: str, word: str) -> bool:
    return _find(text, word) is not None


def _mark(text: str, names: Any) -> tuple[str, dict[str, str]]:
    """Names replaced by marks, the longer first: «Acme, Inc.» is no end of a clause."""
    marks: dict[str, str] = {}
    for number, name in enumerate(sorted({_plain(n) for n in names}, key=len, reverse=True)):
        marks[name] = chr(0xE000 + number)
        text = _pattern(name).sub(marks[name], text)
    return text, marks
