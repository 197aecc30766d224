from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.book.book import Book
from herdbook.data import records
from herdbook.data.records import Conversation
from herdbook.errors import ConfigError, DataError
from herdbook.tokens import train
from herdbook.tokens.corpus import Corpus
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.tokens.train import TrainTokenizer

TEXT = "the quick brown fox jumps over the lazy dog\n一二三四五六七八九十，天地玄黄宇宙洪荒\n" * 3
TEXT += "Shall I compare thee to a summer's day? Thou art more lovely and more temperate.\n"
ALGORITHMS = ("bpe", "unigram", "bytes")
SIZE = 320


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    corpus = Corpus(texts=[TEXT])
    return {
        name: train.train(corpus, name, SIZE, tmp_path_factory.mktemp(name)) for name in ALGORITHMS
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_size_and_special_tokens(trained: dict[str, Tokenizer], algorithm: str) -> None:
    tokenizer = trained[algorithm]
    assert tokenizer.size == SIZE
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.eos_id in tokenizer.stop_ids
    words = [tokenizer.token_bytes(id).decode("utf-8", "replace") for id in range(SIZE)]
    assert " the" in words
    assert len(tokenizer.encode(TEXT)) < len(TEXT)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_text_comes_back(trained: dict[str, Tokenizer], algorithm: str, text: str) -> None:
    text = text.replace("▁", "")
    tokenizer = trained[algorithm]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    data = b"".join(map(tokenizer.token_bytes, ids))
    assert data.removeprefix(b" " if tokenizer.codec.strip else b"") == text.encode()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_text_gives_the_same_bytes(
    book: Book, tmp_path: Path, algorithm: Any, trained: dict[str, Tokenizer]
) -> None:
    (tmp_path / "notes.txt").write_text(TEXT, encoding="utf-8")
    step = TrainTokenizer(text=(str(tmp_path / "notes.txt"),), algorithm=algorithm, size=SIZE)
    first = step.run(book, name="first")
    assert (first.kind, first.metrics["vocabulary"]) == ("tokenizer", SIZE)
    assert step.run(book, name="first").id == first.id
    other = Book(tmp_path / "other")
    assert step.run(other).files == first.files
    again = Tokenizer.load(first.path)
    assert again.encode(TEXT) == trained[algorithm].encode(TEXT)
    assert len(again.encode(TEXT.split("\n")[0])) < first.metrics["tokens"]
    (tmp_path / "notes.txt").write_text(TEXT + "more of it, and more\n", encoding="utf-8")
    assert step.run(book, name="first").id != first.id  # another text, another artifact


def test_a_dataset_will_do(book: Book, tmp_path: Path) -> None:
    rows = [Conversation.of(line, "yes") for line in TEXT.split("\n") if line]
    records.write(tmp_path / "data" / "train.jsonl", rows)
    data = book.add(
        tmp_path / "data",
        kind="dataset",
        name="rows",
        parents=[],
        step="test",
        key="rows",
        config={},
        metrics={},
        versions={},
    )
    made = TrainTokenizer(data=("rows",), size=SIZE).run(book)
    assert made.parents == (data.id,)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_tokens_than_the_text_gives(tmp_path: Path, algorithm: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        train.train(Corpus(texts=[TEXT]), algorithm, 100_000, tmp_path)
    told = str(caught.value)
    assert "size = 100000 is too large for this text, which gives at most" in told
    possible = int(told.split("at most ")[1].split()[0])
    assert train.train(Corpus(texts=[TEXT]), algorithm, possible, tmp_path).size == possible


def test_fewer_tokens_than_characters(tmp_path: Path) -> None:
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
    with pytest.raises(ConfigError, match="is too small: the text's characters and the bytes"):
        train.train(Corpus(texts=[many * 2]), "bpe", 300, tmp_path)


def test_settings_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="traintokenizer has no text"):
        TrainTokenizer().check()
    with pytest.raises(DataError, match="is not there"):
        TrainTokenizer(text=("none.txt",)).check()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="size = 200 leaves no room"):
        TrainTokenizer(text=(str(tmp_path / "a.txt"),), size=200).check()
