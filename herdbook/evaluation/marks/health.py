"""Is what a model writes healthy? Repetition, loops, agreement with itself; all without a judge.

Words are those of `words.py`, so Chinese counts by characters.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from herdbook.evaluation.marks.overlap import answer_tokens, token_f1
from herdbook.evaluation.marks.words import words
from herdbook.evaluation.statistics import Z95, Interval

#: a loop is that many cycles at least, and so many words; «ha ha ha» is none
CYCLES, LOOPED_WORDS = 3, 12


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


def distinct(replies: Sequence[str], n: int) -> Interval:
    """Distinct n-grams over all n-grams of a set of replies (Li 2016). 1 where there are none.

    It falls with the amount of text: compare equally many replies of one length. The interval is ± 1.96
    standard errors of the jackknife over replies (a bootstrap would draw the same reply twice, which is
    no new text); of one reply nothing is known.
    """
    each = [Counter(_grams(words(reply.lower()), n)) for reply in replies]
    whole: Counter[tuple[str, ...]] = sum(each, Counter())
    if not whole:
        return Interval(1.0, 0.0, 1.0)
    value, total = len(whole) / whole.total(), whole.total()
    if len(replies) < 2:
        return Interval(value, 0.0, 1.0)
    without = []
    for one in each:
        own = sum(whole[gram] == count for gram, count in one.items())
        rest = total - one.total()
        without.append((len(whole) - own) / rest if rest else 1.0)
    error = math.sqrt((len(each) - 1) ** 2 / len(each)) * stdev(without)
    return Interval(value, max(0.0, value - Z95 * error), min(1.0, value + Z95 * error))


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


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
