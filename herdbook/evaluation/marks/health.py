"""Is what a model writes healthy? Repetition, loops, agreement with itself; all without a judge.

Words are those of `words.py`, so Chinese counts by characters.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from herdbook.data.records import Message
from herdbook.data.teacher import Ask, Teacher
from herdbook.evaluation.marks.overlap import answer_tokens, token_f1
from herdbook.evaluation.marks.words import words
from herdbook.evaluation.statistics import wilson

#: a loop is that many cycles at least, and so many words; «ha ha ha» is none
CYCLES, LOOPED_WORDS = 3, 12
#: looping replies kept to be looked at
EXAMPLES = 5


@dataclass(frozen=True)
class Loop:
    """A reply that ends in the same text over and over."""

    cycle: str
    times: float  # the last one may be cut
    start: int  # where in the reply it begins


@dataclass(frozen=True)
class Consistency:
    """Several samples of one question. 1 where all say the same."""

    majority: float  # share of the commonest answer
    pairs: float  # share of pairs that are the same answer
    f1: float  # mean token F1 of pairs: alike though not the same


def distinct(replies: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of a set of replies (Li 2016). 1 where there are none.

    It falls with the amount of text: compare equally many replies of one length.
    """
    grams = Counter(gram for reply in replies for gram in _grams(words(reply.lower()), n))
    return len(grams) / grams.total() if grams else 1.0


def repeated(reply: str, n: int = 4) -> float:
    """The share of a reply's n-grams that stood in it before.

    >>> repeated("a b a b a b", 2)
    0.6
    """
    grams = _grams(words(reply.lower()), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loop(reply: str) -> Loop | None:
    """The cycle in which a reply ends, if it does; exact, in time linear in its length.

    A suffix has the period p where every letter equals the one p before it. Of the reversed reply
    that is a prefix, and its length p + z(p), where z(p) counts the letters from p on that equal the
    beginning (Z algorithm, Gusfield 1997). The longest such suffix counts, with its smallest period.
    """
    text = reply.rstrip()
    back = text[::-1]
    best = (0, 0)
    for period, match in enumerate(_z(back)):
        length = period + match
        if period and length >= CYCLES * period and length > best[0]:
            best = (length, period)
    length, period = best
    if not period or len(words(text[len(text) - length :])) < LOOPED_WORDS:
        return None
    start = len(text) - length
    return Loop(text[start : start + period], length / period, start)


def _z(text: str) -> list[int]:
    """z[i]: how many letters from i on equal the text's beginning."""
    size = len(text)
    z, left, right = [0] * size, 0, 0
    for i in range(1, size):
        match = min(right - i, z[i - left]) if i < right else 0
        while i + match < size and text[match] == text[i + match]:
            match += 1
        z[i] = match
        if i + match > right:
            left, right = i, i + match
    return z


def self_consistency(samples: Sequence[str]) -> Consistency:
    """How far samples of one question agree. Answers are the same when SQuAD's normal form is; give
    the extracted answers where replies hold more than these."""
    assert len(samples) > 1, "one sample agrees with itself"
    counts = Counter(tuple(answer_tokens(sample)) for sample in samples)
    same = sum(math.comb(count, 2) for count in counts.values())
    pairs = list(itertools.combinations(samples, 2))
    f1 = sum(token_f1(a, [b]) for a, b in pairs) / len(pairs)
    return Consistency(max(counts.values()) / len(samples), same / len(pairs), f1)


def suite(
    teacher: Teacher, prompts: Sequence[str], samples: int = 3, max_tokens: int = 256, seed: int = 0
) -> dict[str, Any]:
    """Measures of a model over prompts: its greedy replies, and `samples` at temperature 0.7.

    All asks go out in one batch. `looping` is a share with its Wilson interval.
    """
    assert prompts and samples > 1
    greedy = [Ask((Message("user", prompt),), max_tokens) for prompt in prompts]
    drawn = [
        Ask((Message("user", prompt),), max_tokens, 0.7, seed + number)
        for prompt in prompts
        for number in range(samples)
    ]
    answers = teacher.generate([*greedy, *drawn])
    replies = [answer.text for answer in answers[: len(prompts)]]
    rest = [answer.text for answer in answers[len(prompts) :]]
    loops = [loop(reply) for reply in replies]
    own = [self_consistency(rest[n : n + samples]) for n in range(0, len(rest), samples)]
    return {
        "prompts": len(prompts),
        **{f"distinct_{n}": distinct(replies, n) for n in (1, 2, 3)},
        "repeated_4grams": sum(map(repeated, replies)) / len(replies),
        "looping": wilson(sum(one is not None for one in loops), len(replies)).to_json(),
        "empty": sum(not reply.strip() for reply in replies),
        "unfinished": sum(not answer.finished for answer in answers[: len(prompts)]),
        "self_consistency_f1": sum(one.f1 for one in own) / len(own),
        "loops": [
            {"prompt": prompt, "cycle": one.cycle, "times": one.times}
            for prompt, one in zip(prompts, loops, strict=True)
            if one is not None
        ][:EXAMPLES],
    }


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
