from __future__ import annotations

import pytest

from herdbook.errors import DataError
from herdbook.tokens.chat import Rendering, render
from herdbook.tokens.check import check_training_rows
from herdbook.tokens.tokenizer import Tokenizer

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def refusal(tokenizer: Tokenizer, renderings: list[Rendering]) -> str:
    names = [f"line {number}" for number in range(1, len(renderings) + 1)]
    with pytest.raises(DataError) as error:
        check_training_rows(tokenizer, renderings, names)
    return str(error.value)


def test_good_rows_pass(byte_tokenizer: Tokenizer) -> None:
    rows = [render(byte_tokenizer, TALK * turns) for turns in (1, 3)]
    check_training_rows(byte_tokenizer, rows, ["a", "b"])
    check_training_rows(byte_tokenizer, [], [])


def test_an_untrained_end_is_named(byte_tokenizer: Tokenizer) -> None:
    good = render(byte_tokenizer, TALK * 2)
    mask = list(good.mask)
    mask[good.ids.index(2, mask.index(True))] = False  # the first of two answers
    text = refusal(byte_tokenizer, [good, Rendering(good.ids, mask)])
    assert "end-of-turn not trained: 1 of 2 rows (line 2) cannot be trained on" in text
    assert "next: mend the chat template" in text


def test_a_doubled_bos_and_an_idle_row_are_named(byte_tokenizer: Tokenizer) -> None:
    good = render(byte_tokenizer, TALK)
    doubled = Rendering([1, *good.ids], [False, *good.mask])
    idle = render(byte_tokenizer, TALK[:1])
    text = refusal(byte_tokenizer, [good, doubled, *[idle] * 7])
    assert "BOS doubled: 1 of 9 rows (line 2)" in text
    assert "no trained token: 7 of 9 rows (line 3, line 4, line 5, line 6, line 7 …)" in text
    assert "take bos_token out" in text
