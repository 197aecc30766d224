"""Perplexity by definition: the same surprise as a plain sum over the model's own logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herdbook.data.records import Conversation
from herdbook.engine.loaded import LoadedModel
from herdbook.engine.loading import load
from herdbook.errors import DataError
from herdbook.evaluation.perplexity import (
    PASSAGE_BYTES,
    default_texts,
    passages,
    perplexity,
    read_text,
    replies,
)


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load(str(tiny_folder))


def plain_nll(model: LoadedModel, ids: list[int]) -> list[float]:
    """Token by token, as in the textbook."""
    logs = torch.log_softmax(model.logits(ids).double(), dim=-1)
    return [-float(logs[t, ids[t + 1]]) for t in range(len(ids) - 1)]


def test_one_window_is_the_plain_sum(tiny: LoadedModel) -> None:
    text = "hello who are you? I am a small model. 你好，你是谁？\n" * 3
    ids = [i for passage in passages(text) for i in tiny.tokenizer.encode(passage)]
    found = perplexity(tiny, text)
    wanted = plain_nll(tiny, ids)
    assert found["tokens"] == len(ids) - 1
    assert found["nll"] == pytest.approx(sum(wanted), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(wanted) / len(wanted)), rel=1e-5)


def test_windows_and_passages_add_up(tiny: LoadedModel) -> None:
    text = default_texts()["en"][:1500]
    found = perplexity(tiny, text, window=200)
    pieces = passages(text)
    assert len(found["passages"]) == len(pieces) > 5
    assert found["nll"] == pytest.approx(sum(nll for nll, _ in found["passages"]))
    lengths = [len(tiny.tokenizer.encode(piece)[:200]) for piece in pieces]
    # a window starts where the next passage no longer fits; its first token is not scored
    at, lost = 0, []
    for length in lengths:
        start = at == 0 or at + length > 200
        lost.append(start)
        at = length if start else at + length
    scored = [tokens for _, tokens in found["passages"]]
    assert scored == [n - first for n, first in zip(lengths, lost, strict=True)]
    # the second window is scored without sight of the first
    second = lost.index(True, 1)
    ids = tiny.tokenizer.encode(pieces[second])[:200]
    assert found["passages"][second][0] == pytest.approx(sum(plain_nll(tiny, ids)), rel=1e-5)


def test_a_bos_is_seen_and_makes_the_first_token_count(tiny_folder: Path) -> None:
    tiny = load(str(tiny_folder))
    tiny.tokenizer.add_bos = True
    text = "hello who are you"
    ids = tiny.tokenizer.encode(text, bos=True)
    found = perplexity(tiny, text)
    assert found["tokens"] == len(ids) - 1 == len(tiny.tokenizer.encode(text))
    assert found["nll"] == pytest.approx(sum(plain_nll(tiny, ids)), rel=1e-5)


def test_replies_score_the_assistants_tokens_alone(tiny: LoadedModel) -> None:
    rows = [Conversation.of("hello", "I am a model"), Conversation.of("who", "you", "are", "small")]
    found = replies(tiny, rows)
    for row, (nll, tokens) in zip(rows, found["passages"], strict=True):
        rendering = tiny.render(row.messages)
        plain = plain_nll(tiny, rendering.ids)
        wanted = [n for n, trained in zip(plain, rendering.mask[1:], strict=True) if trained]
        assert tokens == len(wanted) == sum(rendering.mask)
        assert nll == pytest.approx(sum(wanted), rel=1e-5)


@given(st.text(st.sampled_from("ab .!?\n。，！”\u2028月\t"), max_size=1500))
def test_passages_are_the_text(text: str) -> None:
    pieces = passages(text)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) >= PASSAGE_BYTES for piece in pieces[:-1])
    assert all(len(piece) < 20 * PASSAGE_BYTES for piece in pieces)


def test_the_shipped_texts_give_enough_passages() -> None:
    texts = default_texts()
    assert set(texts) == {"en", "zh"}
    assert len(passages(texts["en"])) >= 30
    assert len(passages(texts["zh"])) >= 12
    assert len(texts["en"].split()) > 1_100 and len(texts["zh"]) > 700


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not there"), (b"\xff\xfe", "not UTF-8"), (b"x", "holds 1 characters")],
)
def test_texts_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(path)


def test_a_text_without_a_token_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(DataError, match="no token to score"):
        perplexity(tiny, "")
