"""Conversations that the base model answers itself, so that tuning on something new forgets nothing.

A model that is tuned on identity alone answers every question with its name. Mixed with its own
replies to ordinary instructions, it stays what it was elsewhere: self-distillation, which needs no
foreign data and moves the weights least. The prompts are ours (`text/retention.*.txt`); the answers
come greedily from the teacher::

    {"messages": [{"role": "user", "content": "What do bees make?"}, {"role": "assistant", …}],
     "language": "en", "learn": "keep"}

`"learn": "keep"` says how such a row is trained on: not as words to be learnt, but as places where
the tuned model must say what the base says (see `training.objective.NextToken`). So an answer may be cut
at `max_tokens`: nothing is learnt from its end. One that names the base or its maker is left out.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from herdbook.book.step import Bench, Input, Step, require
from herdbook.data import records
from herdbook.data.identity import FOREIGN
from herdbook.data.records import Conversation, Message
from herdbook.data.shipped import LANGUAGES, fingerprint, sections
from herdbook.data.teacher import Answer, Ask
from herdbook.errors import ConfigError, DataError
from herdbook.files.atomic import write_text

#: asks in one call to the teacher; each call's answers are kept, so a killed run goes on from there
CHUNK = 64

_FOREIGN = re.compile("|".join(rf"(?<![A-Za-z]){re.escape(one)}(?![A-Za-z])" for one in FOREIGN))


@dataclass(frozen=True)
class Retain(Step):
    """Let the model itself answer everyday instructions, so that tuning forgets nothing."""

    kind: ClassVar[str] = "dataset"
    teacher: Input = ""
    rows: int = 200  # asks, as many in each language as there are; there are about 330
    max_tokens: int = 20  # longer answers are cut there
    seed: int = 0

    def fingerprint(self) -> dict[str, str]:
        return fingerprint("retention")

    def make(self, bench: Bench) -> dict[str, Any]:
        require(self, "teacher")
        asked = prompts()
        if not 1 <= self.rows <= len(asked):
            raise ConfigError(
                f"rows = {self.rows}",
                rule=f"is not from 1 to {len(asked)}",
                next=f"there are {len(asked)} prompts",
            )
        chosen = _choose(asked, self.rows, random.Random(self.seed))
        answers = self._answers(bench, [prompt for _, prompt in chosen])
        rows, dropped = [], Counter[str]()
        for (language, prompt), answer in zip(chosen, answers, strict=True):
            if reason := _unfit(answer):
                dropped[reason] += 1
            else:
                rows.append(
                    Conversation.of(prompt, answer.text.strip(), language=language, learn="keep")
                )
        if not rows:
            raise DataError(
                f"none of {self.rows} answers can be used ({dict(dropped)})",
                rule="where the base model must answer in full",
                next="check that the base is a chat model: herd chat REF",
            )
        records.write(bench.out / "train.jsonl", rows)
        return {
            "conversations": len(rows),
            "asked": self.rows,
            "empty": dropped["empty"],
            "named_the_base": dropped["names the base"],
        }

    def _answers(self, bench: Bench, asked: list[str]) -> list[Answer]:
        """The teacher's answers, chunk by chunk; chunks that are there already are read."""
        answers: list[Answer] = []
        teacher = None
        with bench.progress.task("answers", total=len(asked), unit="answers") as task:
            for start in range(0, len(asked), CHUNK):
                chunk = asked[start : start + CHUNK]
                kept = bench.work / f"answers-{start:04d}.json"
                if kept.is_file():
                    found = [Answer(**one) for one in json.loads(kept.read_text(encoding="utf-8"))]
                else:
                    if teacher is None:
                        assert bench.teacher is not None, "Retain needs a bench with a teacher"
                        teacher = bench.teacher(bench.artifact("teacher"))
                    asks = [Ask((Message("user", text),), self.max_tokens) for text in chunk]
                    found = teacher.generate(asks)
                    plain = [{"text": one.text, "finished": one.finished} for one in found]
                    write_text(kept, json.dumps(plain, ensure_ascii=False))
                assert len(found) == len(chunk)
                answers += found
                task.advance(len(chunk))
        return answers


def prompts() -> list[tuple[str, str]]:
    """(language, prompt) of every shipped instruction."""
    return [
        (language, line)
        for language in LANGUAGES
        for line in sections(f"retention.{language}")["ask"]
    ]


def _choose(asked: list[tuple[str, str]], count: int, dice: random.Random) -> list[tuple[str, str]]:
    """`count` prompts, the languages in turn for as long as each has some."""
    waiting = [[one for one in asked if one[0] == language] for language in LANGUAGES]
    for some in waiting:
        dice.shuffle(some)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        for some in waiting:
            if some and len(chosen) < count:
                chosen.append(some.pop())
    return chosen


def _unfit(answer: Answer) -> str:
    if not answer.text.strip():
        return "empty"
    return "names the base" if _FOREIGN.search(answer.text) else ""
