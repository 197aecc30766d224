"""Conversations that the base model answers itself, so that tuning on something new forgets nothing.

A model that is tuned on identity alone answers every question with its name. Mixed with its own
replies to ordinary instructions, it stays what it was elsewhere: self-distillation, which needs no
foreign data and moves the weights least. The prompts are ours (`text/retention.*.txt`); the answers
come greedily from the teacher.

An answer that was cut at `max_tokens` is left out, for a model that learns to end there learns to
stop in the middle; so is one that names the base or its maker.
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
from herdbook.data.shipped import LANGUAGES, sections
from herdbook.data.teacher import Answer, Ask
from herdbook.errors import ConfigError, DataError
from herdbook.files.atomic import write_text

#: asks in one call to the teacher; each call's answers are kept, so a killed run goes on from there
CHUNK = 24

_FOREIGN = re.compile("|".join(rf"(?<![A-Za-z]){re.escape(one)}(?![A-Za-z])" for one in FOREIGN))


@dataclass(frozen=True)
class Retain(Step):
    """Let the model itself answer everyday instructions, so that tuning forgets nothing."""

    kind: ClassVar[str] = "dataset"
    teacher: Input = ""
    rows: int = 160  # asks; there are about 240
    max_tokens: int = 64  # longer answers are left out
    seed: int = 0

    def make(self, bench: Bench) -> dict[str, Any]:
        require(self, "teacher")
        asked = prompts()
        if not 1 <= self.rows <= len(asked):
            raise ConfigError(
                f"rows = {self.rows}",
                rule=f"is not from 1 to {len(asked)}",
                next=f"there are {len(asked)} prompts",
            )
        chosen = random.Random(self.seed).sample(asked, self.rows)
        answers = self._answers(bench, [prompt for _, prompt in chosen])
        rows, dropped = [], Counter[str]()
        for (language, prompt), answer in zip(chosen, answers, strict=True):
            if reason := _unfit(answer):
                dropped[reason] += 1
            else:
                rows.append(Conversation.of(prompt, answer.text.strip(), language=language))
        if not rows:
            raise DataError(
                f"none of {self.rows} answers can be used ({dict(dropped)})",
                rule="where the base model must answer in full",
                next="raise max_tokens, or check that the base is a chat model",
            )
        records.write(bench.out / "train.jsonl", rows)
        return {
            "conversations": len(rows),
            "asked": self.rows,
            "cut off": dropped["cut off"],
            "empty": dropped["empty"],
            "names the base": dropped["names the base"],
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


def _unfit(answer: Answer) -> str:
    if not answer.finished:
        return "cut off"
    if not answer.text.strip():
        return "empty"
    return "names the base" if _FOREIGN.search(answer.text) else ""
