"""A model as a judge: a score from 1 to 10, or the better one of two, as MT-Bench asks (Zheng 2023).

The judge is any `Teacher`. What it is shown is delimited by marks that hold a digest of that very
material, so that no answer can close its own frame; its verdict is the last one in its own reply. A
reply without a verdict, or cut before its end, is dropped, and counted, with examples. A pair is judged
in both orders: where the two verdicts disagree it is a tie, and a tie is half a win.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herdbook.data.records import Message
from herdbook.data.teacher import Answer, Ask, Teacher
from herdbook.errors import CapacityError
from herdbook.evaluation.paired import mean_difference
from herdbook.evaluation.statistics import Interval

#: MT-Bench's temperatures of answers; other categories are answered at 0
TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
#: its categories that are judged with a reference
REFERENCED = ("math", "reasoning", "coding")
#: unparsed replies kept to be looked at
EXAMPLES = 5
MAX_TOKENS = 1024

_SCORE = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_CHOICE = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_PROMPTS = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Case:
    """A conversation to judge: as many answers as questions; references, where there are, as well."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[str, ...] = ()
    category: str = ""

    def __post_init__(self) -> None:
        assert len(self.questions) == len(self.answers) > 0
        assert len(self.references) in (0, len(self.questions))


@dataclass(frozen=True)
class Score:
    """One judged answer. `value` is None where the judge's reply holds no score."""

    value: float | None
    reply: str
    category: str = ""
    turn: int = 1  # of how many questions the last was judged


@dataclass(frozen=True)
class Duel:
    """One judged pair: what the first of the two is worth, 1, ½ or 0; None: unparsed.

    `verdicts` are those of both orders in terms of the pair itself: "A" is its first.
    """

    value: float | None
    verdicts: tuple[str | None, str | None]
    replies: tuple[str, str]
    category: str = ""
    turn: int = 1


@dataclass(frozen=True)
class Summary:
    """Means over what was parsed; how many were not, and some of them."""

    mean: Interval | None
    judged: int
    unparsed: int
    by_category: Mapping[str, float] = field(default_factory=dict)
    by_turn: Mapping[int, float] = field(default_factory=dict)
    examples: Sequence[str] = ()
    consistent: float | None = None  # share of the pairs judged alike in both orders
    first: float | None = None  # where the orders disagree: share that preferred what stood first

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "mean": self.mean and self.mean.to_json(),
        }


# ----------------------------------------------------------------------------------------- verdicts


def score_of(reply: str) -> float | None:
    """The last [[rating]]; None if there is none, or it is not from 1 to 10.

    >>> score_of("It says [[10]], but is wrong. [[2]]")
    2.0
    """
    found = _SCORE.findall(reply)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


def choice_of(reply: str) -> str | None:
    """The last [[A]], [[B]] or [[C]]."""
    found = _CHOICE.findall(reply)
    return str(found[-1]) if found else None


# ------------------------------------------------------------------------------------------ judging


def score(teacher: Teacher, cases: Sequence[Case], language: str = "en") -> list[Score]:
    """Judge single answers, all in one batch."""
    asks = [_ask("single", (case,), language) for case in cases]
    return [
        Score(
            score_of(reply.text) if reply.finished else None,
            reply.text,
            case.category,
            len(case.questions),
        )
        for case, reply in zip(cases, replies_of(teacher, asks), strict=True)
    ]


def replies_of(teacher: Teacher, asks: Sequence[Ask]) -> list[Answer]:
    """The judge's replies. One that is too long for it gets an unfinished reply that says so, and does
    not keep the others from theirs."""
    try:
        return teacher.generate(asks)
    except CapacityError as error:
        if len(asks) == 1:
            return [Answer(f"(the judge was not asked: {error.what} {error.rule})", finished=False)]
        return [reply for ask in asks for reply in replies_of(teacher, [ask])]


def compare(
    teacher: Teacher, pairs: Sequence[tuple[Case, Case]], language: str = "en"
) -> list[Duel]:
    """Judge pairs in both orders, all in one batch. A pair's cases share their questions."""
    assert all(a.questions == b.questions for a, b in pairs)
    orders = [order for a, b in pairs for order in ((a, b), (b, a))]
    replies = replies_of(teacher, [_ask("pair", order, language) for order in orders])
    return [
        _duel(pair[0], replies[2 * number], replies[2 * number + 1])
        for number, pair in enumerate(pairs)
    ]


def _duel(case: Case, straight: Answer, swapped: Answer) -> Duel:
    one = choice_of(straight.text) if straight.finished else None
    two = choice_of(swapped.text) if swapped.finished else None
    back = {"A": "B", "B": "A", "C": "C", None: None}[two]
    value: float | None = None
    if one is not None and back is not None:
        value = {"A": 1.0, "B": 0.0, "C": 0.5}[one] if one == back else 0.5
    told = straight.text, swapped.text
    return Duel(value, (one, back), told, case.category, len(case.questions))


def summarise(judged: Sequence[Score] | Sequence[Duel]) -> Summary:
    """The mean of scores, or the share of wins with ties as half."""
    values = [one.value for one in judged if one.value is not None]
    groups: dict[str, list[float]] = {}
    rounds: dict[int, list[float]] = {}
    for one in judged:
        if one.value is not None:
            groups.setdefault(one.category, []).append(one.value)
            rounds.setdefault(one.turn, []).append(one.value)
    dialogues: list[int] = []  # of each value: turns of one dialogue are no independent evidence
    number, before = -1, math.inf
    for one in judged:
        number, before = number + (one.turn <= before), one.turn
        if one.value is not None:
            dialogues.append(number)
    broken = [one for one in judged if one.value is None]
    duels = [one for one in judged if isinstance(one, Duel) and one.value is not None]
    torn = [one.verdicts for one in duels if one.verdicts[0] != one.verdicts[1]]
    flips = [pair for pair in torn if "C" not in pair]
    return Summary(
        mean_difference([0.0] * len(values), values, dialogues) if values else None,
        len(values),
        len(broken),
        {name: sum(ones) / len(ones) for name, ones in groups.items()},
        {turn: sum(ones) / len(ones) for turn, ones in sorted(rounds.items())},
        [_text(one)[-500:] for one in broken[:EXAMPLES]],
        1 - len(torn) / len(duels) if duels else None,
        sum(pair[0] == "A" for pair in flips) / len(flips) if flips else None,
    )


def _text(one: Score | Duel) -> str:
    if isinstance(one, Score):
        return one.reply
    return one.replies[0] if one.verdicts[0] is None else one.replies[1]


def answer_turns(
    teacher: Teacher, rows: Sequence[Mapping[str, Any]], max_tokens: int = 1024, seed: int = 0
) -> list[Case]:
    """Let a model answer MT-Bench's rows (turns, category; perhaps reference), turn by turn."""
    talks: list[list[Message]] = [[] for _ in rows]
    for turn in range(max((len(row["turns"]) for row in rows), default=0)):
        open_ = [n for n, row in enumerate(rows) if turn < len(row["turns"])]
        for n in open_:
            talks[n].append(Message("user", rows[n]["turns"][turn]))
        asks = [
            Ask(
                tuple(talks[n]),
                max_tokens,
                TEMPERATURES.get(rows[n].get("category", ""), 0.0),
                seed,
            )
            for n in open_
        ]
        for n, reply in zip(open_, teacher.generate(asks), strict=True):
            talks[n].append(Message("assistant", reply.text))
    return [
        Case(
            tuple(row["turns"]),
            tuple(message.content for message in talk[1::2]),
            tuple(row.get("reference") or ()),
            row.get("category", ""),
        )
        for row, talk in zip(rows, talks, strict=True)
    ]


def turns(case: Case) -> list[Case]:
    """A case for each of its turns, as MT-Bench judges: the first alone, the second with the first."""
    return [
        Case(case.questions[:n], case.answers[:n], case.references[:n], case.category)
        for n in range(1, len(case.questions) + 1)
    ]


# ---------------------------------------------------------------------------------------- the prompt


def _ask(kind: str, cases: Sequence[Case], language: str) -> Ask:
    text = sections(language)
    case = cases[0]
    said = [*case.questions, *case.references, *(a for one in cases for a in one.answers)]
    mark = mark_of(said)
    task = [text[kind]]
    task += [text["reference"]] * bool(case.references) + [text["turns"]] * (
        len(case.questions) > 1
    )
    task.append(text["safety"].replace("{mark}", mark))
    parts = []
    for turn, question in enumerate(case.questions):
        parts.append(framed(text["question"], question, mark))
        if case.references:
            parts.append(framed(text["expected"], case.references[turn], mark))
        for name, one in zip(("A", "B") if len(cases) > 1 else ("",), cases, strict=True):
            parts.append(framed(f"{text['answer']} {name}".strip(), one.answers[turn], mark))
    parts.append(text[f"ask {kind}"])
    messages = (Message("system", "\n".join(task)), Message("user", "\n\n".join(parts)))
    return Ask(messages, MAX_TOKENS)


def mark_of(texts: Sequence[str]) -> str:
    """A digest of all that is framed; none of the texts holds it."""
    salt = 0
    while True:
        seed = "\0".join([str(salt), *texts])
        mark = hashlib.sha256(seed.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        if not any(mark in text for text in texts):
            return mark
        salt += 1


def framed(name: str, content: str, mark: str) -> str:
    return f"<<{name} {mark}>>\n{content}\n<</{name} {mark}>>"


def sections(language: str) -> dict[str, str]:
    assert language in ("en", "zh")
    raw = (_PROMPTS / f"judge.{language}.txt").read_text(encoding="utf-8")
    parts = re.split(r"^\[([a-z ]+)\]\n", raw, flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}
