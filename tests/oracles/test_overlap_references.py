"""ROUGE and BLEU equal the reference packages on real answers and on random text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.evaluation.marks import overlap

sacrebleu = pytest.importorskip("sacrebleu", reason="pip install sacrebleu")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install rouge-score")

SCORER = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
#: letters of all that the tokenizers tell apart
LETTERS = "abI İK0159 \n\t.,-—'’“&;:<>/{}[]~`中国，。！㐀豈　①\U00020001\u2003\u2f90…é%"
TEXTS = st.text(LETTERS, max_size=40) | st.lists(
    st.sampled_from(["the", "cat", "1,000.5", "3-4", "&quot;", "don't", "<skipped>", "end.", "好"]),
    max_size=12,
).map(" ".join)


def same_rouge(reply: str, reference: str) -> None:
    theirs = SCORER.score(reference, reply)
    for name, ours in overlap.rouge(reply, reference).items():
        expected = theirs[name]
        assert (ours.precision, ours.recall, ours.f1) == pytest.approx(tuple(expected)), name


def same_bleu(replies: list[str], references: list[list[str]]) -> None:
    """sacrebleu wants its references by number: all first ones, all second ones."""
    columns = [list(column) for column in zip(*references, strict=True)]
    for tokenize in ("13a", "zh"):
        metric = sacrebleu.BLEU(tokenize=tokenize)
        expected = metric.corpus_score(replies, columns).score
        assert overlap.bleu(replies, references, tokenize) == pytest.approx(expected, abs=1e-9)
        single = sacrebleu.BLEU(tokenize=tokenize, effective_order=True)
        for reply, ones in zip(replies, references, strict=True):
            expected = single.sentence_score(reply, ones).score
            found = overlap.sentence_bleu(reply, ones, tokenize)
            assert found == pytest.approx(expected, abs=1e-9)


def without_han(text: str) -> str:
    """rouge-score drops Chinese, which we count."""
    return "".join(letter for letter in text if letter < "\u3400")


@given(TEXTS, TEXTS)
@settings(deadline=None)
def test_rouge_of_random_text(reply: str, reference: str) -> None:
    same_rouge(without_han(reply), without_han(reference))


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4))
@settings(deadline=None)
def test_bleu_of_random_text(rows: list[tuple[str, str, str]]) -> None:
    same_bleu([row[0] for row in rows], [[row[1], row[2]] for row in rows])


@pytest.mark.parametrize("tokenize", ["13a", "zh"])
def test_tokens_are_theirs(tokenize: str) -> None:
    theirs = sacrebleu.BLEU(tokenize=tokenize).tokenizer
    for point in [*range(1, 0x3500), *range(0x4DA0, 0x4E10), *range(0x9F90, 0xA010), *range(0xF8F0, 0x10000),
                  0x20001, 0x2A6D5, 0x2F801]:  # fmt: skip
        text = f"x{chr(point)}5"
        expected = theirs(text.rstrip()).split()
        assert overlap.TOKENIZERS[tokenize](text) == expected, hex(point)


def _outputs(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["output"] for line in lines]


def test_real_answers(shared_data: Callable[[str], Path]) -> None:
    names = ("alpaca-7b", "text_davinci_003", "vicuna-7b")
    one, two, three = (
        _outputs(shared_data(f"alpaca_eval/outputs_{name}.jsonl.gz")) for name in names
    )
    for reply, reference in zip(one[:60], two[:60], strict=True):
        same_rouge(without_han(reply), without_han(reference))
    same_bleu(one[:40], [list(pair) for pair in zip(two[:40], three[:40], strict=True)])


def test_real_chinese(shared_data: Callable[[str], Path]) -> None:
    chinese = _outputs(shared_data("alpaca_zh/alpaca_zh.jsonl.gz"))
    same_bleu(chinese[:150], [[one] for one in chinese[150:300]])
