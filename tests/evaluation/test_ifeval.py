"""IFEval's rows: read as they are published; what cannot be is refused."""

from __future__ import annotations

from typing import Any

import pytest

from herdbook.errors import DataError
from herdbook.evaluation.marks.constraints import Followed, follows
from herdbook.evaluation.marks.ifeval import read


def row(name: str, **given: Any) -> dict[str, Any]:
    return {"key": 1, "prompt": "Say it.", "instruction_id_list": [name], "kwargs": [given]}


@pytest.mark.parametrize(
    ("language", "good", "bad"),
    [
        ("zh", "我喜欢北京，也用 Python。", "I like 北京"),
        ("ru", "Я люблю Москву", "I love Moscow"),
        ("hi", "मुझे यह पसंद है", "Я люблю Москву"),
        (
            "en",
            "I think that the weather is fine in this town.",
            "Ich glaube, dass das Wetter gut ist.",
        ),
        (
            "de",
            "Ich glaube, dass das Wetter gut ist.",
            "I think that the weather is fine in this town.",
        ),
        ("en", "It is the one.", "123 !"),
        ("ja", "東京がとても好きです。", "我非常喜欢东京。"),
    ],
)
def test_languages(language: str, good: str, bad: str) -> None:
    (one,) = read(row("language:response_language", language=language))
    assert one.check(good) and not one.check(bad)


def test_a_language_that_is_not_known() -> None:
    with pytest.raises(DataError, match="language 'xx'"):
        read(row("language:response_language", language="xx"))


def test_what_is_cut_by_words() -> None:
    (one,) = read(row("length_constraints:number_sentences", num_sentences=2, relation="less than"))
    assert one.check("One. ") and not one.check("One. Two!")
    (two,) = read(
        row("change_case:capital_word_frequency", capital_frequency=2, capital_relation="at least")
    )
    assert two.check("NASA and ESA") and not two.check("NASA and Esa")
    (three,) = read(row("change_case:english_capital"))
    assert three.check("THE CAT IS IN THE HOUSE!") and not three.check("THE CAT IS in")


def test_a_row_as_published() -> None:
    """Arguments that a rule does not take are null in the Hub's files."""
    given = {
        "key": 1000, "prompt": "Write.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None}, {"relation": "at least", "num_words": 3, "keywords": None}],
    }  # fmt: skip
    ones = read(given)
    assert follows(ones, "One, two three") == Followed((False, True), (False, True))
    assert follows(ones, "Sure, here:\nOne two three") == Followed((False, True), (True, True))
    (again,) = read(row("combination:repeat_prompt"))
    assert again.check("say it. Yes.")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "needs instruction_id_list"),
        ({"instruction_id_list": ["x"], "kwargs": []}, "as many kwargs"),
        (row("punctuation:no_coma"), "did you mean 'punctuation:no_comma'"),
        (row("keywords:existence"), "keywords"),
        (row("keywords:existence", keywords=["("]), "keywords:existence"),
        (row("length_constraints:number_words", num_words=3, relation="about"), "is no bound"),
        (row("punctuation:no_comma", num_words=3), "num_words"),
        (row("startend:end_checker", end_phrase=3), "end_phrase"),
    ],
)
def test_what_cannot_be_is_refused(given: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(given)
