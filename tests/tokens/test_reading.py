"""Which file counts, and what stands beside SentencePiece models of the families."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from herdbook.book.book import Book
from herdbook.tokens import reading, sentence, templates
from herdbook.tokens.fetch import FetchTokenizer
from herdbook.tokens.sentence import BYTE, CONTROL, NORMAL, UNKNOWN, PieceModel
from herdbook.tokens.tokenizer import Tokenizer
from tests.tokens.conftest import byte_metadata, piece_metadata


def pieces(scores: list[float], kind: int = sentence.BPE) -> PieceModel:
    words = ["▁", "a", "b", "ab", "ba", "▁a"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    ids = {"unk": 0, "bos": 1, "eos": 2}
    return PieceModel(names, [0.0] * 259 + scores, types, kind=kind, ids=ids)


SIZE = 265
ORDERED = [-9.0, -8.0, -7.0, -1.0, -2.0, -3.0]


def test_what_merges_can_say() -> None:
    assert pieces(ORDERED).translates
    assert not pieces([-9.0, -8.0, -7.0, -1.0, -1.0, -3.0]).translates  # ab and ba tie
    assert not pieces(ORDERED, kind=sentence.UNIGRAM).translates
    runs = pieces(ORDERED)
    more = {"pieces": ["▁▁", "▁▁▁"], "scores": [-1e9, -1e9], "types": [NORMAL] * 2}
    for name, values in more.items():
        getattr(runs, name).extend(values)
    assert runs.translates  # LLaMA's runs of spaces tie, and grow alike


def test_the_model_file_counts_where_a_json_says_less(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(pieces([-9.0, -8.0, -7.0, -1.0, -1.0, -3.0]).serialise())
    Tokenizer.load(tmp_path / "x.model").save(tmp_path / "tied")
    assert reading.find(tmp_path / "tied") == tmp_path / "tied" / "tokenizer.model"
    (tmp_path / "y.model").write_bytes(pieces(ORDERED).serialise())
    Tokenizer.load(tmp_path / "y.model").save(tmp_path / "plain")
    assert reading.find(tmp_path / "plain") == tmp_path / "plain" / "tokenizer.json"
    (tmp_path / "plain" / "tokenizer.model").write_text("version https://git-lfs\n")
    assert reading.find(tmp_path / "plain") == tmp_path / "plain" / "tokenizer.json"


def test_t5_counts_its_extra_ids_down(tmp_path: Path) -> None:
    """T5: <extra_id_0> is the last row, 32,099 of 32,100."""
    (tmp_path / "spiece.model").write_bytes(pieces(ORDERED, sentence.UNIGRAM).serialise())
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 100}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.size == SIZE + 100
    assert tokenizer.encode("<extra_id_0>", specials=True) == [SIZE + 99]
    assert tokenizer.encode("<extra_id_99>", specials=True) == [SIZE]
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.size == tokenizer.size
    assert again.encode("a<extra_id_7>", specials=True) == tokenizer.encode(
        "a<extra_id_7>", specials=True
    )


def test_chatglm_has_its_special_tokens_behind_the_pieces(tmp_path: Path) -> None:
    """ChatGLM 2 and 3: 64,789 pieces, then [MASK] 64789, [gMASK] 64790, [sMASK], sop 64792 …"""
    (tmp_path / "tokenizer.model").write_bytes(pieces(ORDERED).serialise())
    config = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    start = tokenizer.encode("[gMASK]sop<|user|>", specials=True)
    assert start == [SIZE + 1, SIZE + 3, SIZE + 6]
    assert tokenizer.prompt("ab") == [*start[:2], *tokenizer.encode("ab")], (
        "before any text; no <s>"
    )
    assert not tokenizer.holds_special("philosophy, sopping")
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("[gMASK]sop"))
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert (again.size, again.special_ids) == (tokenizer.size, tokenizer.special_ids)
    assert again.prompt("ab") == tokenizer.prompt("ab")
    assert not again.holds_special("philosophy, sopping")


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_extending_and_pruning_go_through_a_folder(kind: str, tmp_path: Path) -> None:
    """What the settings say (BOS, template, padding) outlives a change of the vocabulary."""
    make = byte_metadata if kind == "bytes" else piece_metadata
    metadata = make() | {"tokenizer.ggml.padding_token_id": 0}
    tokenizer = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    keep = sorted(tokenizer.codec.closure(tokenizer.special_ids | {5}))
    for changed in (tokenizer.only(keep), tokenizer.extended(tokenizer.codec)):
        changed.save(tmp_path)
        again = Tokenizer.load(tmp_path)
        assert again.chat_template == tokenizer.chat_template
        assert (again.bos_id, again.eos_id, again.add_bos) == (1, 2, tokenizer.add_bos)
        assert again.stop_ids == tokenizer.stop_ids
        written = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert written["pad_token"] == tokenizer.token_bytes(0).decode()


def test_fetching_brings_the_model_file_too(book: Book, tmp_path: Path) -> None:
    (tmp_path / "y.model").write_bytes(pieces(ORDERED).serialise())
    folder = tmp_path / "llama"
    Tokenizer.load(tmp_path / "y.model").save(folder)
    made = FetchTokenizer(path=str(folder)).run(book)
    assert {"tokenizer.json", "tokenizer.model"} <= set(made.files)
    assert FetchTokenizer(path=str(folder)).run(book).id == made.id
    (folder / "tokenizer.model").write_bytes(pieces(ORDERED[::-1]).serialise())
    assert FetchTokenizer(path=str(folder)).run(book).id != made.id


def test_a_models_own_kind_of_tokenizer_comes_with_it(
    book: Book, tiny_folder: Path, tmp_path: Path
) -> None:
    """Fetch copies qwen.tiktoken, spiece.model and the like."""
    from herdbook.model.fetch import Fetch

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(pieces(ORDERED).serialise())
    made = Fetch(ref=str(folder)).run(book)
    assert Tokenizer.load(made.path).encode("ab") == Tokenizer.load(folder).encode("ab")


def test_a_tokenizer_fetched_under_another_name_is_another(
    book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template may be found by the folder's name alone, and "." says nothing of it."""
    ids = {}
    for name in ("plain", "other", "koala-7b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(pieces(ORDERED).serialise())
        monkeypatch.chdir(tmp_path / name)
        made = FetchTokenizer(path=".").run(book)
        ids[name] = made.id
        found = Tokenizer.load(made.path).chat_template
        assert found == (templates.read("koala") if name == "koala-7b" else None)
    assert ids["plain"] == ids["other"] != ids["koala-7b"]
    (tmp_path / "koala-7b" / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 }}"}')
    own = FetchTokenizer(path=".").run(book).id
    assert own not in ids.values()
    (tmp_path / "koala-7b").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert FetchTokenizer(path=".").run(book).id == own, "its own template hangs on no name"


def test_all_that_is_read_beside_a_file_counts(tmp_path: Path) -> None:
    """Of one file too, and merges.txt of a vocab.json."""
    (tmp_path / "y.model").write_bytes(pieces(ORDERED).serialise())
    step = FetchTokenizer(path=str(tmp_path / "y.model"))
    keys = [step.key()]
    for name, text in (
        ("tokenizer_config.json", "{}"),
        ("added_tokens.json", '{"<x>": 265}'),
        ("generation_config.json", '{"eos_token_id": 1}'),
    ):
        (tmp_path / name).write_text(text)
        keys.append(step.key())
    assert len(set(keys)) == 4
    (tmp_path / "unread.json").write_text("{}")
    assert step.key() == keys[-1]
    folder = tmp_path / "gpt"
    folder.mkdir()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("a b\n")
    before = FetchTokenizer(path=str(folder)).key()
    (folder / "merges.txt").write_text("b a\n")
    assert FetchTokenizer(path=str(folder)).key() != before


def test_the_model_that_a_tokenizer_json_was_made_from_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(pieces(ORDERED).serialise())
    Tokenizer.load(tmp_path / "x.model").save(tmp_path / "first")
    assert reading.find(tmp_path / "first") == tmp_path / "first" / "tokenizer.json"
    Tokenizer.load(tmp_path / "first").save(tmp_path / "second")
    kept = tmp_path / "second" / "tokenizer.model"
    assert kept.read_bytes() == (tmp_path / "first" / "tokenizer.model").read_bytes()
    kept.write_text("version https://git-lfs\n")
    Tokenizer.load(tmp_path / "second").save(tmp_path / "third")
    assert not (tmp_path / "third" / "tokenizer.model").exists()
