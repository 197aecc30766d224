"""Does an answer keep to the passages that it was given?

`faithfulness` is simple and deterministic: the share of what the answer mentions that the passages
mention too. What counts as mentioned (each once, but Chinese characters):

- **numbers**, by value («1,000» is «1000»), Chinese digits up to 十 included;
- **names**: words with a capital letter within a sentence; in Chinese text, every Latin word;
- **content**: English words but the commonest, without a plural's or possessive's s; Chinese
  characters but the commonest particles. A character is in the passages when it stands there beside
  one of the neighbours that it has in the answer.

It sees invented figures, names and subjects. It sees no negation and no wrong relation between words
that are there («A beat B» for «B beat A»): for that there is `judged`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from herdbook.data.records import Message
from herdbook.data.teacher import Ask, Teacher
from herdbook.evaluation.judging.judge import (
    MAX_TOKENS,
    framed,
    mark_of,
    replies_of,
    sections,
)
from herdbook.evaluation.marks.words import HAN, sentences, words

_VERDICT = re.compile(r"\[\[\s*(yes|partly|no)\s*\]\]", re.IGNORECASE)
_VALUES = {"yes": 1.0, "partly": 0.5, "no": 0.0}
_ENGLISH = """
a about after all also an and any are as at be because been before being both but by can
could did do does for from had has have he her his how i if in into is it its may might more
most no not of on one only or other our out over she should so some such than that the their
them then there these they this those to under up very was we were what when where which
while who will with would you your yes according passage passages answer
"""
_COMMON = frozenset(_ENGLISH.split())
_PARTICLES = re.compile(
    r"[的了是在和与及或也都就而但把被让对从到由于为着过吗呢吧啊这那其之以有会能可不没很]"
)
_DIGITS = {digit: str(n) for n, digit in enumerate("零一二三四五六七八九十")} | {
    "两": "2",
    "〇": "0",
}
_COUNTED = re.compile(r"([一二三四五六七八九十两])(?=[个位名年月日天岁次种本台条件人万亿元倍页章])")


@dataclass(frozen=True)
class Faithful:
    """`score` over all that the answer mentions; None where it mentions nothing."""

    score: float | None
    numbers: float | None
    names: float | None
    unsupported: tuple[str, ...]


def faithfulness(answer: str, passages: Sequence[str]) -> Faithful:
    """Share of the answer's numbers, names and content that stand in the passages."""
    text = "\n".join(passages)
    numbers, names, content = _numbers(answer), _names(answer), _content(answer)
    known_numbers, known_words = _numbers(text), {word.lower() for word in words(text)}
    wrong_numbers = numbers - known_numbers
    wrong_names = {name for name in names if name.lower() not in known_words}
    content -= {_root(name.lower()) for name in names}  # counted as names
    wrong_content = content - _content(text)
    characters, strange = _characters(answer, text)
    total = len(numbers) + len(names) + len(content) + characters
    wrong = [*sorted(wrong_numbers), *sorted(wrong_names), *sorted(wrong_content), *strange]
    missed = len(wrong) - len(strange) + sum(map(len, strange))
    return Faithful(
        1 - missed / total if total else None,
        1 - len(wrong_numbers) / len(numbers) if numbers else None,
        1 - len(wrong_names) / len(names) if names else None,
        tuple(wrong),
    )


def judged(
    teacher: Teacher, cases: Sequence[tuple[str, Sequence[str]]], language: str = "en"
) -> list[float | None]:
    """(answer, passages) each → 1, ½ or 0 by a judge; None: its reply holds no verdict."""
    asks = [_ask(answer, passages, language) for answer, passages in cases]
    found: list[float | None] = []
    for reply in replies_of(teacher, asks):
        said = _VERDICT.findall(reply.text) if reply.finished else []
        found.append(_VALUES[said[-1].lower()] if said else None)
    return found


def _ask(answer: str, passages: Sequence[str], language: str) -> Ask:
    text = sections(language)
    mark = mark_of([*passages, answer])
    task = text["faithful"] + "\n" + text["safety"].replace("{mark}", mark)
    parts = [
        framed(f"{text['passage']} {n}", passage, mark) for n, passage in enumerate(passages, 1)
    ]
    parts += [framed(text["answer"], answer, mark), text["ask faithful"]]
    return Ask((Message("system", task), Message("user", "\n\n".join(parts))), MAX_TOKENS)


def _numbers(text: str) -> set[str]:
    found = set()
    for number in re.findall(r"\d+(?:[.,]\d+)*", text):
        plain = re.sub(r",(?=\d{3}(?!\d))", "", number)
        whole, point, rest = plain.partition(".")
        found.add(whole.lstrip("0") + (point + rest.rstrip("0") if rest.strip("0") else "") or "0")
    return found | {_DIGITS[digit] for digit in _COUNTED.findall(text)}


def _names(text: str) -> set[str]:
    """Capitalised words, but not a sentence's first; next to Chinese, every Latin word."""
    found = set()
    for sentence in sentences(text):
        tokens = [one for one in words(sentence) if not one[0].isdigit()]
        chinese = any(re.match(HAN, one) for one in tokens)
        for place, token in enumerate(tokens):
            if re.match(HAN, token):
                continue
            capital = token[0].isupper() and (place > 0 or any(c.isupper() for c in token[1:]))
            if (chinese and token.isascii()) or (capital and token != "I"):
                found.add(token.removesuffix("'s").removesuffix("’s"))
    return found


def _content(text: str) -> set[str]:
    found = set()
    for token in words(text):
        if not re.match(rf"{HAN}|\d", token) and token.lower() not in _COMMON:
            found.add(_root(token.lower()))
    return found


def _characters(answer: str, passages: str) -> tuple[int, list[str]]:
    """How many Chinese characters the answer's content has, and the runs without support."""
    known = set(passages)
    pairs = {part[i : i + 2] for part in _parts(passages) for i in range(len(part) - 1)}
    total, strange = 0, []
    for part in _parts(answer):
        total += len(part)
        beside = [part[i : i + 2] in pairs for i in range(len(part) - 1)]
        held = [a or b for a, b in zip([False, *beside], [*beside, False], strict=True)]
        if len(part) == 1:
            held = [part in known]
        marks = "".join("+" if ok else "-" for ok in held)
        strange += [part[one.start() : one.end()] for one in re.finditer("-+", marks)]
    return total, strange


def _parts(text: str) -> list[str]:
    """Runs of Chinese characters, cut at particles and at counted digits."""
    runs = re.findall(rf"{HAN}+", _COUNTED.sub("，", text))
    return [part for run in runs for part in _PARTICLES.split(run) if part]


def _root(word: str) -> str:
    word = word.removesuffix("'s").removesuffix("’s")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
