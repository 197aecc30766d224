"""What a generated reply is worth. A scorer looks at one item and one reply and gives a mark.

    def exact(item: Item, reply: str) -> Mark: ...

`Mark(None, why)` says that the reply could not be read: it counts as wrong, is reported as a share of
its own, and some are kept as examples. Scorers are named in `SCORERS`, and imported when a task asks
for one. What takes long is marked all `TOGETHER`, in parallel.

Some figures are no mean of marks: a corpus's BLEU, a micro F1. Their marks have `counts`, which are summed
over all replies, and `POOLED` says what the sums are worth (results.py); the mark's own value is that of
the one reply, for pairs.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias

from herdbook.errors import UnknownName, nearest
from herdbook.evaluation.tasks.task import LETTERS, Item


@dataclass(frozen=True)
class Mark:
    """value: 0 to 1; None: the reply could not be read, and `why`."""

    value: float | None
    why: str = ""
    counts: tuple[float, ...] = ()


Scorer: TypeAlias = Callable[[Item, str], Mark]

#: by the name that a task's `metrics` use: module and function
SCORERS = {
    "exact": "herdbook.evaluation.marks.scorers:exact",
    "contains": "herdbook.evaluation.marks.scorers:contains",
    "number": "herdbook.evaluation.marks.scorers:number",
    "last_number": "herdbook.evaluation.marks.scorers:last_number",
    "letter": "herdbook.evaluation.marks.scorers:letter",
    "constraints": "herdbook.evaluation.marks.scored:followed",
    "constraints_loose": "herdbook.evaluation.marks.scored:followed_loose",
    "instructions": "herdbook.evaluation.marks.scored:instructions",
    "instructions_loose": "herdbook.evaluation.marks.scored:instructions_loose",
    "exact_match": "herdbook.evaluation.marks.scored:exact_match",
    "f1": "herdbook.evaluation.marks.scored:f1",
    "rouge1": "herdbook.evaluation.marks.scored:rouge1",
    "rouge2": "herdbook.evaluation.marks.scored:rouge2",
    "rouge_l": "herdbook.evaluation.marks.scored:rouge_l",
    "bleu": "herdbook.evaluation.marks.scored:sentence_bleu",
    "bleu_zh": "herdbook.evaluation.marks.scored:sentence_bleu_zh",
    "corpus_bleu": "herdbook.evaluation.marks.scored:corpus_bleu",
    "corpus_bleu_zh": "herdbook.evaluation.marks.scored:corpus_bleu_zh",
    "extraction_f1": "herdbook.evaluation.marks.scored:fields",
    "extraction_micro_f1": "herdbook.evaluation.marks.scored:fields",
}
#: of items and their replies, the marks
TOGETHER = {"code": "herdbook.evaluation.marks.scored:code"}
#: what summed counts are worth, 0 to 1
POOLED = {
    "instructions": "herdbook.evaluation.marks.scored:share",
    "instructions_loose": "herdbook.evaluation.marks.scored:share",
    "corpus_bleu": "herdbook.evaluation.marks.overlap:bleu_of",
    "corpus_bleu_zh": "herdbook.evaluation.marks.overlap:bleu_of",
    "extraction_micro_f1": "herdbook.evaluation.marks.scored:micro_f1",
}


def check(name: str) -> None:
    """Raise where there is no metric of generated replies of that name."""
    known = [*SCORERS, *TOGETHER]
    if name not in known:
        raise UnknownName(f"metric {name!r}", rule="is not known", next=nearest(name, known))


def scorer(name: str) -> Scorer:
    """The scorer of that name; its module is imported only now."""
    check(name)
    found: Scorer = _function(SCORERS[name])
    return found


def marked(name: str, items: Sequence[Item], replies: Sequence[str]) -> list[Mark]:
    """The marks of replies by one metric, in their order."""
    check(name)
    if name in TOGETHER:
        found: list[Mark] = _function(TOGETHER[name])(items, replies)
        return found
    one = scorer(name)
    return [one(item, reply) for item, reply in zip(items, replies, strict=True)]


def pooled(name: str) -> Callable[[Sequence[float]], float]:
    """From summed counts to the figure."""
    found: Callable[[Sequence[float]], float] = _function(POOLED[name])
    return found


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# ------------------------------------------------------------------------------------ short answers


def exact(item: Item, reply: str) -> Mark:
    """Equal, but for full-width forms, case, white space, and punctuation at both ends."""
    return Mark(float(plain(reply) in map(plain, references(item))))


def contains(item: Item, reply: str) -> Mark:
    """The answer stands in the reply, in Latin letters and digits as words of their own."""
    said = plain(reply)
    return Mark(float(any(_stands(plain(one), said) for one in references(item))))


def references(item: Item) -> Sequence[str]:
    """The row's `answers` (or SQuAD's answers.text), or its `answer` if that is a list; else its one
    answer."""
    more = item.extra.get("answers")
    if isinstance(more, Mapping):
        more = more.get("text")
    if not more and isinstance(item.extra.get("answer"), list):
        more = item.extra["answer"]
    return [str(one) for one in more] if isinstance(more, list) and more else [item.answer]


def _stands(wanted: str, said: str) -> bool:
    if not wanted:
        return not said
    before = r"(?<![a-z0-9])" if wanted[0].isascii() and wanted[0].isalnum() else ""
    behind = r"(?![a-z0-9])" if wanted[-1].isascii() and wanted[-1].isalnum() else ""
    return bool(re.search(before + re.escape(wanted) + behind, said))


def plain(text: str) -> str:
    """What `exact` compares.

    >>> plain(" Paris，  FRANCE。\\n")
    'paris, france'
    """
    words = " ".join(_wide(text).casefold().split())
    start, end = 0, len(words)
    while start < end and _punctuation(words[start]):
        start += 1
    while end > start and _punctuation(words[end - 1]):
        end -= 1
    return words[start:end]


def _punctuation(one: str) -> bool:
    """Not what changes an answer: C#, 50 %, @home."""
    return one == " " or one in _MARKS or unicodedata.category(one) in ("Ps", "Pe", "Pi", "Pf")


def _wide(text: str) -> str:
    """Full-width forms as ordinary ones; a superscript stays one, so that m² holds no 2."""
    return "".join(
        unicodedata.normalize("NFKC", c) if "\u3000" <= c <= "\uffef" else c for c in text
    )


_MARKS = frozenset(".,;:!?'\"`*_…、。·•")


# ------------------------------------------------------------------------------------------ numbers

_NUMBER = re.compile(r"[-+]?[$¥€]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?[$¥€]?\.\d+")
_MARKED = re.compile(rf"####\s*({_NUMBER.pattern})")


def number(item: Item, reply: str) -> Mark:
    """GSM8K's rule: the number after ####, commas removed; without it the reply is unparsed."""
    found = _MARKED.search(_wide(reply))
    return _same_number(item, found[1] if found else "", "no number after ####")


def last_number(item: Item, reply: str) -> Mark:
    """The number after ####, or the last of the reply: for models that were not shown the form."""
    reply = _wide(reply)
    if marked := _MARKED.search(reply):
        return _same_number(item, marked[1], "")
    found = _NUMBER.findall(reply)
    return _same_number(item, found[-1] if found else "", "no number")


def _same_number(item: Item, found: str, why: str) -> Mark:
    wanted = _MARKED.search(item.answer)
    reference = _value(wanted[1] if wanted else item.answer)
    if reference is None:
        return Mark(None, f"the reference {item.answer[-30:]!r} is no number")
    value = _value(found)
    return Mark(None, why) if value is None else Mark(float(value == reference))


def _value(text: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[,$¥€\s]", "", text))
    except InvalidOperation:
        return None


# ------------------------------------------------------------------------------------------ letters

_LETTER = r"[(\[（【「\"“'*]*\s*(?P<letter>[A-Z])(?![A-Za-z0-9'’])"
#: what announces an answer; a letter must follow at once
_SAID = re.compile(
    r"(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)\s*(?:is|are|would be|:|=)+\s*:?\s*"
    r"(?:(?:option|choice|letter)\s+)?"
    + _LETTER
    + r"|(?:答案|选项|选择)\s*(?:应该是|应当是|应是|应为|就是|是|为|:|选)+\s*:?\s*(?:选项)?\s*"
    + _LETTER.replace("letter", "zh")
    + r"|(?<!不)(?:故|因此|所以|应|综上),?\s*(?:应|正确)?选\s*(?:择|项)?\s*:?\s*"
    + _LETTER.replace("letter", "so")
    + r"|"
    r"\\boxed\s*\{\s*(?:\\text\s*\{)?\s*(?P<boxed>[A-Z])\s*\}",
    re.IGNORECASE,
)
#: a reply that is a letter and nothing else, or a letter with its option behind it
_ALONE = re.compile(r"\s*(?:选\s*)?[(\[（【*]*(?P<letter>[A-Z])[)\]）】*]*\s*(?:[.:,、。]|$|\n)")
#: lines that begin with a letter: the options, told once more
_LISTED = re.compile(r"^\s*[(\[（【*]*([A-Z])[)\]）】*]*[.:、)]", re.MULTILINE)
#: behind a letter: another one is meant as well
_OR = re.compile(r"[)\]】*]*\s*(?:or|and|和|或者?|与|及|、|,|/|&)\s*[(\[【*]*[A-Z](?![A-Za-z0-9])")


def letter(item: Item, reply: str) -> Mark:
    """The one option that the reply says is right, in English or Chinese.

    Careful rather than clever: what is said after «the answer is», «答案是», «故选», in a box, or alone
    at the beginning. Two different ones, two at once («A or B»), or a letter that is no option's:
    unparsed.
    """
    text = _wide(reply)
    letters = LETTERS[: len(item.choices)]
    found: set[str] = set()
    for one in _SAID.finditer(text):
        name = next(name for name, value in one.groupdict().items() if value)
        said = one[name]
        if not said.isupper():
            continue  # «the answer is a number»
        if _OR.match(text, one.end()):
            return Mark(None, "names two options at once")
        found.add(said)
    if not found and (alone := _ALONE.match(text)):
        if _OR.match(text, alone.end("letter")):
            return Mark(None, "names two options at once")
        found |= {alone["letter"], *_LISTED.findall(text)}
    if len(found) > 1:
        return Mark(None, f"names several options: {', '.join(sorted(found))}")
    if not found or not found <= set(letters):
        return Mark(None, f"{next(iter(found))} is no option" if found else "names no option")
    return Mark(float(letters.index(found.pop()) in item.right))
