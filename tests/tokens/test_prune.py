"""Fewer tokens, the same ones on the text: for every kind of tokenizer, and any text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.book.book import Book
from herdbook.errors import ConfigError, FileError, GateError
from herdbook.tokens import prune, sentence, train
from herdbook.tokens.chat import render
from herdbook.tokens.corpus import Corpus
from herdbook.tokens.fetch import FetchTokenizer
from herdbook.tokens.prune import PruneTokenizer
from herdbook.tokens.tokenizer import Tokenizer

SharedData = Callable[[str], Path]
TEXT = "she sells sea shells by the sea shore, and the shells she sells are sea shells\n" * 2
TEXT += "peter piper picked a peck of pickled peppers where is the peck he picked\n"
TEXT += """Tyger Tyger, burning bright, in the forests of the night;
What immortal hand or eye, could frame thy fearful symmetry?
In what distant deeps or skies, burnt the fire of thine eyes?
On what wings dare he aspire? What the hand, dare seize the fire?
"""
TEXT += "山不在高有仙则名水不在深有龙则灵斯是陋室惟吾德馨\n高山流水山高水长\n"


@pytest.fixture(scope="module", params=["bpe", "unigram", "bytes", "json"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """json: SentencePiece's BPE as a tokenizer.json alone."""
    folder = tmp_path_factory.mktemp(request.param)
    kind = "bpe" if request.param == "json" else request.param
    tokenizer = train.train(Corpus(texts=[TEXT]), kind, 340, folder)
    if request.param == "json":
        tokenizer.save(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return tokenizer


@settings(max_examples=100, deadline=None)
@given(st.text("shel rao,山不在高水\n🦙", max_size=30))
def test_the_same_tokens_on_any_text_it_was_pruned_for(trained: Tokenizer, text: str) -> None:
    keep = sorted(trained.codec.closure(set(trained.encode(text)) | trained.special_ids))
    pruned = trained.only(keep)
    assert pruned.size == len(keep)
    assert [keep[id] for id in pruned.encode(text)] == trained.encode(text)
    assert [pruned.token_bytes(id) for id in range(len(keep))] == list(
        map(trained.token_bytes, keep)
    )
    other = "anything else 其他 🦙"
    assert pruned.decode(pruned.encode(other)) == other
    assert {pruned.token_bytes(id) for id in pruned.special_ids} == {
        trained.token_bytes(id) for id in trained.special_ids
    }


def test_what_merging_makes_on_the_way() -> None:
    """The tokens of a word are kept with those that they are merged from, and no others."""
    order = {("a", "b"): 0, ("c", "d"): 1, ("ab", "cd"): 2, ("b", "c"): 3, ("abcd", "e"): 4}
    found = sentence.made("abcde", lambda left, right: order.get((left, right)))
    assert found == {"a", "b", "c", "d", "e", "ab", "cd", "abcd", "abcde"}
    assert sentence.made("xy", lambda left, right: order.get((left, right))) == {"x", "y"}


def test_the_step_and_what_is_saved(book: Book, tmp_path: Path, trained: Tokenizer) -> None:
    (tmp_path / "tokenizer").mkdir()
    trained.save(tmp_path / "tokenizer")
    FetchTokenizer(path=str(tmp_path / "tokenizer")).run(book)
    (tmp_path / "a.txt").write_text("she sells sea shells\n山高水长", encoding="utf-8")
    step = PruneTokenizer(text=(str(tmp_path / "a.txt"),), tokenizer="tokenizer")
    made = step.run(book, name="small")
    pruned = Tokenizer.load(made.path)
    assert made.metrics["vocabulary_before"] == trained.size == 340
    assert made.metrics["vocabulary"] == pruned.size < 340
    assert made.metrics["kept_share"] == pruned.size / 340
    names = [pruned.token_bytes(id) for id in pruned.encode("she sells sea shells")]
    assert names == list(map(trained.token_bytes, trained.encode("she sells sea shells")))
    assert (pruned.bos_id is None) == (trained.bos_id is None)
    kept = (tmp_path / "tokenizer" / "tokenizer.model").is_file()
    assert (made.path / "tokenizer.model").is_file() == kept  # what could be extended still can
    for attribute in ("bos_id", "eos_id"):
        before, after = getattr(trained, attribute), getattr(pruned, attribute)
        assert trained.token_bytes(before) == pruned.token_bytes(after)
    pieces = getattr(trained.codec, "pieces", None)
    if pieces is None or pieces.kind == sentence.BPE:  # GGUF has no unigram
        again = Tokenizer.from_gguf(pruned.gguf_metadata(), tmp_path / "x.gguf")
        assert again.encode("she sells sea shells") == pruned.encode("she sells sea shells")


def test_conversations_keep_what_their_template_writes(
    byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from herdbook.data.records import Conversation

    corpus = Corpus(talks=[Conversation.of("Hello", "Hello world")])
    used = {id for ids in prune.encoded(byte_tokenizer, corpus) for id in ids}
    keep = sorted(byte_tokenizer.codec.closure(used))
    pruned = byte_tokenizer.only(keep)
    messages = corpus.talks[0].messages
    expected = render(byte_tokenizer, messages)
    found = render(pruned, messages)
    assert ([keep[id] for id in found.ids], found.mask) == (expected.ids, expected.mask)
    prune.check(byte_tokenizer, pruned, keep, corpus)
    with pytest.raises(GateError, match="would be encoded into other tokens"):
        prune.check(byte_tokenizer, pruned, keep[::-1], corpus)


def test_a_text_that_needs_everything(book: Book, tmp_path: Path) -> None:
    train.train(Corpus(texts=[TEXT]), "bytes", 300, tmp_path).save(tmp_path / "t")
    FetchTokenizer(path=str(tmp_path / "t")).run(book)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    step = PruneTokenizer(text=(str(tmp_path / "a.txt"),), tokenizer="t")
    before = book.entries()
    with pytest.raises(ConfigError, match="all 300 tokens are needed by this text"):
        step.run(book)
    assert book.entries() == before
    with pytest.raises(ConfigError, match="tokenizer is empty"):
        PruneTokenizer(text=(str(tmp_path / "a.txt"),)).check()


def test_a_kind_that_cannot_be_pruned(tmp_path: Path) -> None:
    """A unigram tokenizer.json alone: its pieces are not merges."""
    train.train(Corpus(texts=[TEXT]), "unigram", 320, tmp_path).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(FileError, match="of type Unigram cannot be pruned"):
        tokenizer.codec.closure({5})


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("llama.model", 0.2),
        ("chinese_llama2_merged.model", 0.2),
        ("internlm.model", 0.15),
        ("chinese_sp.model", 0.25),
        ("gguf/ggml-vocab-qwen2.gguf", 0.1),
        ("gguf/ggml-vocab-falcon.gguf", 0.15),
        ("rwkv_world_vocab.txt", 0.15),
        ("cpm_bee_vocab.txt", 0.1),
    ],
)
def test_real_vocabularies(shared_data: SharedData, name: str, below: float) -> None:
    tokenizer = Tokenizer.load(shared_data(f"tokenizers/{name}"))
    corpus = Corpus(
        texts=[
            shared_data("text/tinyshakespeare.txt").read_text(encoding="utf-8")[:40_000],
            shared_data("text/tang300.jsonl").read_text(encoding="utf-8")[:40_000],
        ]
    )
    used = {id for ids in prune.encoded(tokenizer, corpus) for id in ids}
    keep = sorted(tokenizer.codec.closure(used | tokenizer.special_ids))
    pruned = tokenizer.only(keep)
    prune.check(tokenizer, pruned, keep, corpus)
    assert len(used) <= pruned.size < below * tokenizer.size
