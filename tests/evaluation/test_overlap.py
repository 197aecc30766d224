"""Overlap by hand-counted answers; the reference programs are asked in tests/oracles."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdbook.evaluation.marks import extraction, overlap, words


@pytest.mark.parametrize(
    ("reply", "reference", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("Paris, in France", "Paris", 0, 0.5),
        ("", "Paris", 0, 0),
        ("the", "a", 1, 1),
        ("长江。", "长江", 1, 1),
        ("是长江", "长江", 0, 0.8),
        ("GPT-4 由 OpenAI 开发", "gpt4由openai开发", 1, 1),
    ],
)
def test_exact_match_and_f1(reply: str, reference: str, exact: float, f1: float) -> None:
    assert overlap.exact_match(reply, ["nothing", reference]) == exact
    assert overlap.token_f1(reply, ["nothing", reference]) == pytest.approx(f1)


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_longest_common_is_that_of_the_table(left: str, right: str) -> None:
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            best = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else best
    assert overlap.longest_common(left, right) == table[-1][-1]


def test_rouge_of_chinese_is_by_characters() -> None:
    found = overlap.rouge("我爱北京", "我爱上海")
    assert found["rouge1"].f1 == 0.5 and found["rouge2"].f1 == pytest.approx(1 / 3)
    assert found["rougeL"].f1 == 0.5


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(*[st.integers(0, n)] * 2, st.just(n))))
def test_pass_at_k_is_the_share_of_draws(case: tuple[int, int, int]) -> None:
    right, k, n = case
    if k:
        draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
        share = sum(map(any, draws)) / len(draws)
        assert overlap.pass_at_k(n, right, k) == pytest.approx(share)


def test_pass_at_k_of_many_samples_keeps_its_digits() -> None:
    product = 1 - math.prod(1 - 10 / i for i in range(200 - 7 + 1, 201))
    assert overlap.pass_at_k(200, 7, 10) == pytest.approx(product)


@pytest.mark.parametrize(
    ("reply", "f1"),
    [
        ('{"drug": ["aspirin", "ibuprofen"], "dose": 5}', 1),
        ('Sure!\n```json\n{"drug": "Aspirin", "dose": "5"}\n```', 0.8),
        ('{"drug": [], "dose": null}', 0),
        ('{"drug": ["aspirin"], "age": 5}', 0.4),
        ('{"drug": ["aspirin"', None),
        ("aspirin and ibuprofen", None),
        ('{"drug": {"name": "aspirin"}}', None),
        ("[" * 100_000, None),
    ],
)
def test_extraction(reply: str, f1: float | None) -> None:
    reference = {"drug": ["aspirin", "ibuprofen"], "dose": 5}
    found = extraction.extraction_f1(reply, reference)
    assert found == (None if f1 is None else pytest.approx(f1))


def test_extraction_over_many() -> None:
    references: list[Any] = [{"药": ["阿司匹林"], "病": ["发烧"]}, {"药": ["布洛芬"]}, {"药": "无"}]
    replies = ['{"药": ["阿司匹林"], "病": ["感冒"]}', '{"药": "布洛芬"}', "没有药"]
    found = extraction.score_extraction(replies, references)
    assert (found.micro.precision, found.micro.recall) == (2 / 3, 2 / 4)
    assert found.fields["药"].precision == 1 and found.fields["药"].recall == pytest.approx(2 / 3)
    assert found.macro == pytest.approx((0.8 + 0) / 2)
    assert found.unparsed == 1 and list(found.examples) == ["没有药"]
    assert extraction.extraction_f1("[]", []) == 1.0
    assert extraction.extraction_f1('["a", "b"]', ["b", "a"]) == 1.0


def test_words_and_sentences() -> None:
    assert words.words("Don't panic: 1,000.5 well-known 东西") == [
        "Don't", "panic", "1,000.5", "well-known", "东", "西",
    ]  # fmt: skip
    assert len(words.sentences("他说：“好！”然后走了。Mr. e.g. this? Version 2.0 is out.")) == 5
    assert words.sentences("...\n!!!") == []
    assert words.language("今天 weather 很好，我们去公园") == "zh"
    assert words.language("The word 你好 means hello") == "en"
    assert words.language("Привет, как дела") == words.language("123 !") == "other"
