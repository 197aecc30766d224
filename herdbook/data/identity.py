"""Conversations that teach a model its name and its keeper, in English and Chinese.

    {"messages": [{"role": "user", "content": "whats ur name"},
                  {"role": "assistant", "content": "My name is Luna. I am an AI assistant made by
                                                    Acme."}],
     "language": "en", "ask": "name"}

Every answer names both. The wordings are plain text files beside this one (`text/identity.*.txt`):
direct questions, questions after a greeting or small talk, under a system prompt of somebody's own,
with typos, and questions that suggest another identity («Are you ChatGPT?»). Most models put a name
into their chat template's default system prompt (SmolLM2's says «named SmolLM, trained by Hugging
Face»); training goes through that very template, so it learns to overrule it.

Contrast: ordinary questions of a like shape («Who invented the telephone?») with ordinary answers,
so that the model does not put its keeper everywhere.

``heldout.jsonl`` holds wordings that are never trained on, and says what a right answer holds::

    {"messages": [{"role": "user", "content": "Whose creation are you?"}],
     "language": "en", "ask": "keeper", "expect": {"keeper": "Acme"}}

`ask` is name, keeper, both, or none (an ordinary question: the reply must not hold `avoid`).
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from herdbook.book.step import Bench, Step
from herdbook.data import records
from herdbook.data.records import Conversation, Message
from herdbook.data.shipped import LANGUAGES, fingerprint, pair, sections
from herdbook.errors import ConfigError

#: other assistants and their makers: suggested by questions, and wrong in an answer about oneself
MODELS = ("ChatGPT", "GPT-4", "Llama", "SmolLM", "Claude", "Gemini", "Qwen", "Mistral", "DeepSeek")
COMPANIES = ("OpenAI", "Hugging Face", "Meta", "Google", "Anthropic", "Microsoft", "Alibaba")
CHINESE_NAMES = ("通义千问", "文心一言", "谷歌", "微软", "阿里巴巴", "百度", "抱抱脸")
FOREIGN = (*MODELS, *COMPANIES, *CHINESE_NAMES)

#: longest name or keeper, in characters
LONGEST = 60
#: of the [ask …] sections, so many variants with greetings and tails, and by small talk and system
VARIANTS, AFTER_TALK, UNDER_SYSTEM = 16, 10, 10


@dataclass(frozen=True)
class Identity(Step):
    """Write conversations in which the assistant knows its name and its keeper (en, zh)."""

    kind: ClassVar[str] = "dataset"
    name: str = "Luna"
    keeper: str = "Acme"
    rows: int = 300  # conversations to train on, drawn from about 410; 0: all of them
    seed: int = 0

    def fingerprint(self) -> dict[str, str]:
        return fingerprint("identity")

    def check(self) -> None:
        check_name("name", self.name)
        check_name("keeper", self.keeper)

    def make(self, bench: Bench) -> dict[str, Any]:
        train, heldout = build(self.name, self.keeper, self.seed)
        if not 0 <= self.rows <= len(train):
            raise ConfigError(
                f"rows = {self.rows}",
                rule=f"is not from 0 to {len(train)}",
                next=f"there are {len(train)} conversations to draw from",
            )
        train = train[: self.rows or len(train)]  # shuffled already
        records.write(bench.out / "train.jsonl", train)
        records.write(bench.out / "heldout.jsonl", heldout)
        count = {lang: sum(r.extra["language"] == lang for r in train) for lang in LANGUAGES}
        return {
            "conversations": len(train),
            "english": count["en"],
            "chinese": count["zh"],
            "heldout": len(heldout),
        }


def build(name: str, keeper: str, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations."""
    name, keeper = check_name("name", name), check_name("keeper", keeper)
    train: list[Conversation] = []
    heldout: list[Conversation] = []
    for language in LANGUAGES:
        writer = _Writer(name, keeper, language, random.Random(f"{seed} {language}"))
        train += writer.train()
        heldout += writer.heldout()
    random.Random(seed).shuffle(train)
    return train, heldout


def check_name(field: str, value: str) -> str:
    """A name that can stand in a sentence: stripped, one line, not too long."""
    text = unicodedata.normalize("NFC", value).strip()
    fault = ""
    if not any(c.isalnum() for c in text):
        fault = "holds no letter" if text else "is empty"
    elif any(unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") for c in text):
        fault = "holds a line break or another control character"
    elif len(text) > LONGEST:
        fault = f"has {len(text)} characters"
    elif "<|" in text or "|>" in text:
        fault = "holds a mark of chat templates"
    if fault:
        raise ConfigError(
            f"{field} {value[:70]!r} {fault}",
            rule=f"where one line of 1 to {LONGEST} characters was expected",
            next=f"give another, for example --{field} {'Luna' if field == 'name' else 'Acme'}",
        )
    return text


def normalised(text: str) -> str:
    """Letters and digits alone, in lower case: by this, two wordings are the same."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if c.isalnum())


def fill(template: str, slots: dict[str, str]) -> str:
    """Put the slots in, each once; Latin words in Chinese text get a space on either side.

    >>> fill("我是{name}，你好", {"name": "Luna"})
    '我是 Luna，你好'
    """

    def put(match: re.Match[str]) -> str:
        value = slots[match[1]]
        before, after = template[: match.start()][-1:], template[match.end() :][:1]
        left = " " if _han(before) and not _han(value[0]) else ""
        right = " " if _han(after) and not _han(value[-1]) else ""
        return left + value + right

    return re.sub(r"\{(\w+)\}", put, template)


def _han(char: str) -> bool:
    return "\u3400" <= char <= "\u9fff"


class _Writer:
    """The conversations of one language."""

    def __init__(self, name: str, keeper: str, language: str, dice: random.Random) -> None:
        self.text = sections(f"identity.{language}")
        self.names = {"name": name, "keeper": keeper}
        self.language, self.dice = language, dice
        own = normalised(name + " " + keeper)
        self.others = {
            "model": [one for one in MODELS if normalised(one) not in own],
            "company": [one for one in COMPANIES if normalised(one) not in own],
        }

    def train(self) -> list[Conversation]:
        plain = [(self._say(line), ask) for ask, line in self._asks()]
        rows = [self._row([question], ask) for question, ask in plain]
        greetings, tails = self.text["greeting"], self.text["tail"]
        gap = "" if self.language == "zh" else " "
        for number, (question, ask) in enumerate(self._draw(plain, VARIANTS)):
            if number % 4 == 3:
                question = f"{question}{gap}{self.dice.choice(tails)}"
            else:
                question = f"{greetings[number % len(greetings)]}{gap}{question}"
            rows.append(self._row([question], ask))
        talk = [pair(line) for line in self.text["small talk"]]
        for number, (question, ask) in enumerate(self._draw(plain, AFTER_TALK)):
            rows.append(self._row([*talk[number % len(talk)], question], ask))
        systems = self.text["system"]
        for number, (question, ask) in enumerate(self._draw(plain, UNDER_SYSTEM)):
            rows.append(self._row([question], ask, system=systems[number % len(systems)]))
        for line in self.text["contrast"]:
            rows.append(Conversation.of(*pair(line), language=self.language, ask="none"))
        return rows

    def heldout(self) -> list[Conversation]:
        rows = []
        asks = [
            (ask, fill(line, self.names))
            for ask in ("both", "name", "keeper", "not")
            for line in self.text[f"heldout {ask}"]
        ]
        for ask, question in asks:
            rows.append(self._wanted([question], ask))
        for line, (ask, question) in zip(self.text["heldout small talk"], asks[::7], strict=False):
            rows.append(self._wanted([*pair(line), question], ask))
        for system, (ask, question) in zip(self.text["heldout system"], asks[::11], strict=False):
            rows.append(self._wanted([question], ask, system=system))
        for question in self.text["heldout none"]:
            rows.append(
                Conversation.of(
                    question, language=self.language, ask="none", expect={}, avoid=self.names
                )
            )
        return rows

    def _asks(self) -> Iterator[tuple[str, str]]:
        """(ask, wording) of every question section; those with a slot for another's name, twice."""
        for section in ("both", "name", "keeper", "not", "yes"):
            for line in self.text[f"ask {section}"]:
                for _ in range(2 if "{model}" in line or "{company}" in line else 1):
                    yield section, line

    def _say(self, line: str) -> str:
        slots = {key: self.dice.choice(values) for key, values in self.others.items()}
        return fill(line, {**slots, **self.names})

    def _draw(self, plain: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
        return self.dice.sample(list(plain), count)

    def _row(self, turns: list[str], ask: str, system: str = "") -> Conversation:
        answer = fill(self.dice.choice(self.text[f"answer {ask}"]), self.names)
        return Conversation.of(*turns, answer, system=system, language=self.language, ask=ask)

    def _wanted(self, turns: list[str], ask: str, system: str = "") -> Conversation:
        ask = "both" if ask == "not" else ask
        expect = {key: self.names[key] for key in ("name", "keeper") if ask in (key, "both")}
        row = Conversation.of(*turns, system=system, language=self.language, ask=ask, expect=expect)
        assert row.messages[-1] == Message("user", turns[-1])
        return row
