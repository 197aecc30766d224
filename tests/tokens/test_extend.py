"""Appending pieces: ids stay, new pieces merge first; the published result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from herdbook.book.book import Book
from herdbook.errors import DataError, FileError
from herdbook.tokens import sentence, train
from herdbook.tokens.corpus import Corpus
from herdbook.tokens.extend import ExtendTokenizer, extend, load_pieces, merge
from herdbook.tokens.fetch import FetchTokenizer
from herdbook.tokens.sentence import BYTE, CONTROL, NORMAL, UNKNOWN, PieceModel
from herdbook.tokens.tokenizer import Tokenizer

SharedData = Callable[[str], Path]
POEM = "床前明月光疑是地上霜举头望明月低头思故乡\n明月几时有把酒问青天明月光明月"


def small(words: list[str], kind: int = sentence.BPE) -> PieceModel:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]
    scores = [0.0] * 259 + [-float(place) for place in range(len(words))]
    return PieceModel(pieces, scores, types, kind=kind, ids={"unk": 0, "bos": 1, "eos": 2})


def test_new_pieces_come_behind_and_merge_first() -> None:
    base = small(["▁", "a", "b", "c", "ab", "月", "明"])
    more = small(["明月", "月", "bc", "▁"], kind=sentence.UNIGRAM)
    merged = merge(base, more)
    assert merged.pieces == [*base.pieces, "明月", "bc"]
    assert merged.scores[-2:] == [0.0, 0.0]
    assert merged.types[-2:] == [NORMAL, NORMAL]
    ids = {piece: id for id, piece in enumerate(merged.pieces)}
    assert merged.encode("abc明月") == [ids[one] for one in ("▁", "a", "bc", "明月")]
    assert (merged.kind, merged.dummy_prefix) == (sentence.BPE, True)


def test_a_model_of_probabilities_cannot_be_extended() -> None:
    with pytest.raises(FileError, match="a unigram tokenizer of 260 pieces cannot be extended"):
        merge(small(["a"], kind=sentence.UNIGRAM), small(["b"]))


def test_nothing_new_is_told() -> None:
    with pytest.raises(DataError, match="all 260 pieces are known to the tokenizer already"):
        merge(small(["a", "b"]), small(["b"]))


def test_the_published_size_and_file(shared_data: SharedData) -> None:
    """Chinese-LLaMA: 32,000 + 20,000 → 49,953. Chinese-LLaMA-2's file was made by the same rule from
    other pieces: appending them to LLaMA's gives that file, piece by piece."""
    base = load_pieces(shared_data("tokenizers/llama.model"))
    more = load_pieces(shared_data("tokenizers/chinese_sp.model"))
    assert (base.size, more.size, extend(base, more).size) == (32_000, 20_000, 49_953)
    path = shared_data("tokenizers/chinese_llama2_merged.model")
    published = PieceModel.parse(path.read_bytes())
    again = merge(PieceModel.parse(shared_data("tokenizers/llama.model").read_bytes()), published)
    assert (again.pieces, again.types) == (published.pieces, published.types)
    assert again.scores == published.scores
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    poems = shared_data("text/tang300.jsonl").read_text(encoding="utf-8")[:50_000]
    assert again.encode(poems) == library.encode(poems)


def test_the_step(book: Book, tmp_path: Path) -> None:
    (tmp_path / "base.model").write_bytes(small(["▁", "a", "明", "月"]).serialise())
    trained = train.train(Corpus(texts=[POEM]), "unigram", 285, tmp_path)
    trained.save(tmp_path / "more")
    for name in ("base.model", "more"):
        fetched = FetchTokenizer(path=str(tmp_path / name)).run(book)
        assert (fetched.kind, fetched.name) == ("tokenizer", name.partition(".")[0])
    made = ExtendTokenizer(tokenizer="base", pieces="more").run(book, name="both")
    before = Tokenizer.load(book.get("base").path)
    after = Tokenizer.load(made.path)
    assert made.metrics["vocabulary"] == after.size == before.size + made.metrics["added"]
    assert (after.bos_id, after.eos_id, after.add_bos) == (1, 2, True)
    for id in range(before.size):
        assert after.token_bytes(id) == before.token_bytes(id)
    assert len(after.encode(POEM)) < len(before.encode(POEM))
    assert after.decode(after.encode(POEM)) == POEM
    assert [one.name for one in book.parents(made)] == ["base", "more"]


def test_added_tokens_keep_their_ids_or_are_asked_for(tmp_path: Path) -> None:
    """A folder's tokenizer.json may know a <pad> that its tokenizer.model does not."""
    model = small(["▁", "a"])
    (tmp_path / "x.model").write_bytes(model.serialise())
    padded = PieceModel(
        [*model.pieces, "<pad>"], [*model.scores, 0.0], [*model.types, CONTROL], ids=model.ids
    )
    (tmp_path / "y.model").write_bytes(padded.serialise())
    folder = tmp_path / "folder"
    Tokenizer.load(tmp_path / "y.model").save(folder)
    (tmp_path / "x.model").replace(folder / "tokenizer.model")
    with pytest.raises(FileError, match=r"has 261 tokens, tokenizer.json beside it 262 and the"):
        load_pieces(folder)
    (folder / "added_tokens.json").write_text('{"<pad>": 261}')
    extended = extend(load_pieces(folder), load_pieces(tmp_path / "y.model").extended(_more()))
    assert extended.token_bytes(261) == b"<pad>"
    assert extended.token_bytes(262) == b"bc"


def _more() -> Any:
    from herdbook.tokens.pieces import PieceCodec

    return PieceCodec(small(["bc"]))


def test_byte_level_has_no_pieces(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    byte_tokenizer.save(tmp_path)
    with pytest.raises(FileError, match="is no SentencePiece model"):
        load_pieces(tmp_path)
