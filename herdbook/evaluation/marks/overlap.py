"""How much of a reference a reply holds: exact match, token F1, ROUGE, BLEU; and pass@k.

English is counted as the reference programs count it, so that figures compare with published ones:
exact match and F1 as SQuAD's script, ROUGE as rouge-score without stemming, BLEU as sacrebleu.
What those programs do not say of Chinese: it is counted by characters, its punctuation dropped.
All are shares from 0 to 1 but BLEU, which is 0 to 100 by custom.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from herdbook.evaluation.marks.words import HAN

_HAN = re.compile(HAN)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII = str.maketrans("", "", string.punctuation)
_WIDE = str.maketrans(
    "", "", "，。！？；：、《》〈〉【】「」『』（）〔〕［］｛｝“”‘’…—～·．％＂＇－／"
)
_ROUGE = re.compile(rf"[a-z0-9]+|{HAN}")


@dataclass(frozen=True)
class Overlap:
    """Of n-grams or of the longest common subsequence."""

    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, common: int, reply: int, reference: int) -> Overlap:
        precision, recall = common / max(reply, 1), common / max(reference, 1)
        total = precision + recall
        return cls(precision, recall, 2 * precision * recall / total if total else 0.0)


# ------------------------------------------------------------------------------ exact match and F1


def answer_tokens(text: str) -> list[str]:
    """SQuAD's normal form: lower case; no punctuation, no articles; Chinese one by one.

    >>> answer_tokens("The Yangtze, 长江。")
    ['yangtze', '长', '江']
    """
    text = text.lower().translate(_ASCII)
    if _HAN.search(text):
        text = _HAN.sub(r" \g<0> ", text.translate(_WIDE))
    return _ARTICLES.sub(" ", text).split()


def exact_match(reply: str, references: Sequence[str]) -> float:
    """1 when the reply is one of the references, normal form against normal form."""
    mine = answer_tokens(reply)
    return float(any(mine == answer_tokens(one) for one in references))


def token_f1(reply: str, references: Sequence[str]) -> float:
    """The best F1 over the references. No tokens on one side: 1 if on neither, else 0."""
    mine = answer_tokens(reply)
    return max((_f1(mine, answer_tokens(one)) for one in references), default=0.0)


def _f1(reply: list[str], reference: list[str]) -> float:
    if not reply or not reference:
        return float(reply == reference)
    return Overlap.of(_common(reply, reference), len(reply), len(reference)).f1


# ------------------------------------------------------------------------------------------- ROUGE


def rouge(reply: str, reference: str) -> dict[str, Overlap]:
    """ROUGE-1, -2 and -L of Lin 2004, by the names rouge1, rouge2, rougeL."""
    mine, theirs = _ROUGE.findall(reply.lower()), _ROUGE.findall(reference.lower())
    found = {}
    for n in (1, 2):
        left, right = _grams(mine, n), _grams(theirs, n)
        found[f"rouge{n}"] = Overlap.of(_common(left, right), len(left), len(right))
    longest = longest_common(mine, theirs)
    return found | {"rougeL": Overlap.of(longest, len(mine), len(theirs))}


def longest_common(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of one number.

    Hyyrö 2004: a zero bit in the row marks where the length grows.
    """
    places: dict[Hashable, int] = {}
    for number, one in enumerate(left):
        places[one] = places.get(one, 0) | 1 << number
    every = (1 << len(left)) - 1
    row = every
    for one in right:
        met = row & places.get(one, 0)
        row = (row + met | row - met) & every
    return (every ^ row).bit_count()


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _common(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    return (Counter(left) & Counter(right)).total()


# -------------------------------------------------------------------------------------------- BLEU

#: apart from its neighbours: most of ASCII's punctuation, but ' and - and what stands in numbers
_MARKS = re.compile(r"([ -&(-+/:-@\[-`{-~])")
_AFTER, _BEFORE = re.compile(r"([^0-9])([.,])"), re.compile(r"([.,])([^0-9])")
_DASH = re.compile(r"([0-9])(-)")
#: sacrebleu's ranges for zh as they work: two of them were meant to lie beyond U+FFFF, and take
#: U+2001–2A6D (so “ ” … — too) and U+2F81–2FA1 instead
_SPLIT = re.compile(
    "([\u2001-\u2a6d\u2e80-\u2eff\u2f00-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef"
    "\u3200-\u33ff\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9"
    "\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])"
)


def bleu_13a(text: str) -> list[str]:
    """mteval-v13a's tokens."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name, mark in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(name, mark)
    return _mteval(f" {text} ")


def bleu_zh(text: str) -> list[str]:
    """Chinese characters and marks one by one, the rest as mteval-v13a."""
    return _mteval(_SPLIT.sub(r" \1 ", text.strip()))


def _mteval(text: str) -> list[str]:
    text = _AFTER.sub(r"\1 \2 ", _MARKS.sub(r" \1 ", text))
    return _DASH.sub(r"\1 \2 ", _BEFORE.sub(r" \1 \2", text)).split()


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"13a": bleu_13a, "zh": bleu_zh}


def bleu(
    replies: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "13a"
) -> float:
    """Corpus BLEU-4, 0 to 100 (Papineni 2002; orders without a match smoothed as mteval does).

    `references[i]` are all references of `replies[i]`; each reply is measured against the length
    nearest its own.
    """
    assert len(replies) == len(references) > 0
    each = [
        bleu_counts(reply, ones, tokenize) for reply, ones in zip(replies, references, strict=True)
    ]
    return 100 * bleu_of([sum(column) for column in zip(*each, strict=True)])


def sentence_bleu(reply: str, references: Sequence[str], tokenize: str = "13a") -> float:
    """BLEU of one reply, over no more orders than the reply has."""
    return 100 * bleu_of(bleu_counts(reply, references, tokenize), whole=False)


def bleu_counts(reply: str, references: Sequence[str], tokenize: str = "13a") -> tuple[int, ...]:
    """What BLEU knows of a reply, to be summed over several: for each order the n-grams that match and
    all n-grams; the reply's length, and that of the nearest reference."""
    assert references
    mine, theirs = TOKENIZERS[tokenize](reply), [TOKENIZERS[tokenize](one) for one in references]
    right, total = [], []
    for n in range(1, 5):
        most: Counter[tuple[str, ...]] = Counter()
        for one in theirs:
            most |= Counter(_grams(one, n))
        grams = Counter(_grams(mine, n))
        right.append((grams & most).total())
        total.append(grams.total())
    wanted = min((abs(len(one) - len(mine)), len(one)) for one in theirs)[1]
    return *right, *total, len(mine), wanted


def bleu_of(sums: Sequence[float], whole: bool = True) -> float:
    """BLEU from 0 to 1 of summed counts. whole: an order that no reply has makes it 0."""
    right, total, (length, wanted) = sums[:4], sums[4:8], sums[8:]
    if not any(right):
        return 0.0
    logs, halvings = [], 0
    for hit, count in zip(right, total, strict=True):
        if count:
            halvings += not hit
            logs.append(math.log((hit or 0.5**halvings) / count))
        elif whole:
            return 0.0
    brevity = min(1.0, math.exp(1 - wanted / length))
    return brevity * math.exp(sum(logs) / len(logs))


# ------------------------------------------------------------------------------------------ pass@k


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, drawn from `samples` of which `right` are
    (Chen 2021): 1 − C(n−c, k) / C(n, k), without bias.

    >>> pass_at_k(10, 3, 1)
    0.3
    """
    assert 0 <= right <= samples and 0 < k <= samples, "k is at most the number of samples"
    missed = math.comb(samples - right, k)
    every = math.comb(samples, k)
    return (every - missed) / every
