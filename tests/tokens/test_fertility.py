from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.errors import DataError
from herdbook.tokens.fertility import fertility, script_of, script_runs
from herdbook.tokens.tokenizer import Tokenizer
from tests.tokens.conftest import byte_metadata


def test_scripts() -> None:
    assert [script_of(one) for one in "aé你々かカщعह한Ａ"] == [
        *("Latin", "Latin", "Han", "Han", "Kana", "Kana", "Cyrillic", "Arabic", "Devanagari"),
        *("Hangul", "Latin"),
    ]
    assert {script_of(one) for one in "1 ,。\n🦙\u0301\u0000"} == {""}


def test_runs_cover_the_text() -> None:
    text = "«Hi, 2 you» 你好，world! "
    runs = script_runs(text)
    assert [(script, text[start:end]) for script, start, end in runs] == [
        ("Latin", "«Hi, 2 you» "),
        ("Han", "你好，"),
        ("Latin", "world! "),
    ]
    assert script_runs("12 + 3") == [("other", 0, 6)]
    assert script_runs("") == []


def test_counted_by_hand(byte_tokenizer: Tokenizer) -> None:
    found = fertility(byte_tokenizer, ["Hello world 你好"])
    # Hello | Ġw | or | l | d | Ġ, then three bytes a character
    latin = {"characters": 12, "words": 2, "tokens": 6}
    assert {name: found["Latin"][name] for name in latin} == latin
    assert found["Latin"]["tokens_per_word"] == 3.0
    assert found["Han"]["tokens"] == 6
    assert found["Han"]["tokens_per_character"] == 3.0
    assert found["Han"]["tokens_per_word"] is None  # Chinese does not part its words
    assert list(found) == ["all", "Latin", "Han"]
    assert found["all"]["tokens_per_word"] == 3.0
    assert found["all"]["tokens_per_character"] == 12 / 14


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("Hello wor你好щ1, \n🦙é", max_size=30), min_size=1, max_size=4))
@pytest.mark.parametrize("kind", ["byte_tokenizer", "piece_tokenizer"])
def test_every_token_and_character_counts_once(
    kind: str, request: pytest.FixtureRequest, texts: list[str]
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    if not any(texts):
        with pytest.raises(DataError, match="nothing to count"):
            fertility(tokenizer, texts)
        return
    found = fertility(tokenizer, texts)
    whole = found.pop("all")
    assert whole["characters"] == sum(map(len, texts))
    assert whole["tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
    for name in ("characters", "tokens", "words"):
        assert whole[name] == sum(count[name] for count in found.values())


def test_special_text_counts_as_plain_text() -> None:
    tokenizer = Tokenizer.from_gguf(byte_metadata(), Path("x.gguf"))
    assert fertility(tokenizer, ["<|im_end|>"])["all"]["tokens"] == 10
