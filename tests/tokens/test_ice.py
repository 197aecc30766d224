"""ChatGLM-6B's and GLM-130B's tokenizer: ids worked out by hand from the published rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.errors import FileError
from herdbook.tokens import reading, sentence, templates
from herdbook.tokens.chat import render, show_plain
from herdbook.tokens.ice import IceCodec
from herdbook.tokens.sentence import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, PieceModel
from herdbook.tokens.tokenizer import Tokenizer

# The first five ids are the published ones; the words are so few that no two ways lead to a text.
WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁", "a", "b", "▁a", "你", "好", "H"]
SIZE = len(WORDS)
MASK, GMASK, SOP, EOP = SIZE, SIZE + 1, SIZE + 4, SIZE + 5
TAB, BYTES = SIZE + 8, SIZE + 88
BREAK, SPACE, A, B, WORD_A, NI, HAO = 4, 5, 6, 7, 8, 9, 10


def blank(count: int) -> int:
    return SIZE + 9 + count - 2


def icetk() -> PieceModel:
    """As icetk has it: nothing behind the ordinary pieces."""
    types = [UNKNOWN, CONTROL, CONTROL, CONTROL, USER_DEFINED, *[NORMAL] * (SIZE - 5)]
    scores = [0.0] * 5 + [-3.0] * (SIZE - 5)
    ids = {"unk": 0, "bos": 1, "eos": 2}
    return PieceModel(list(WORDS), scores, types, kind=sentence.UNIGRAM, ids=ids)


def later() -> PieceModel:
    """As ChatGLM-6B's second file has it: all pieces, the marks as ordinary ones."""
    model = icetk()
    marks = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    white = ["<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    model.pieces.extend([*marks, *white, *bytes_])
    model.types.extend([*[USER_DEFINED] * (8 + 80), *[BYTE] * 256])
    model.scores.extend([0.0] * (8 + 80 + 256))
    return model


def folder(path: Path, model: PieceModel, **config: int | str) -> Path:
    path.mkdir()
    (path / "ice_text.model").write_bytes(model.serialise())
    said = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {}, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    return path


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("ice") / "chatglm-6b"
    return Tokenizer.load(folder(path, later(), num_image_tokens=0))


def test_the_layout_is_the_published_one(chatglm: Tokenizer) -> None:
    """With 130,000 words: <|tab|> 130008, <|blank_4|> 130011, byte F0 130328, 130,344 in all."""
    assert (TAB - SIZE, blank(4) - SIZE, BYTES + 0xF0 - SIZE) == (8, 11, 328)
    assert chatglm.size - SIZE == 344
    assert (chatglm.bos_id, chatglm.eos_id, chatglm.add_bos) == (SOP, EOP, False)
    assert chatglm.stop_ids == {EOP, 2}


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("你好", [SPACE, NI, HAO]),
        ("a\n    b\ta", [WORD_A, BREAK, blank(4), B, TAB, A]),
        ("\na", [SPACE, BREAK, A]),
        ("a a", [WORD_A, WORD_A]),
        ("a" + " " * 80 + "b", [WORD_A, blank(80), B]),
        ("a" + " " * 81 + "b", [WORD_A, blank(80), SPACE, B]),
        ("a" + " " * 162 + "b", [WORD_A, blank(80), blank(80), blank(2), B]),
        ("a<n>b<|blank_3|>", [WORD_A, BREAK, B, blank(3)]),  # the text of a piece is the piece
        ("a👋", [WORD_A, *(BYTES + byte for byte in "👋".encode())]),
    ],
)
def test_text_is_written_as_published(chatglm: Tokenizer, text: str, ids: list[int]) -> None:
    assert chatglm.encode(text) == ids
    meant = text.replace("<n>", "\n").replace("<|blank_3|>", "   ")
    assert chatglm.decode(ids) == meant


def test_of_the_word_that_no_byte_has_to_spell(chatglm: Tokenizer) -> None:
    assert chatglm.codec.within(b"a\n  b") == [A, BREAK, blank(2), B]
    assert chatglm.codec.within("👋".encode()[:2]) == [BYTES + 0xF0, BYTES + 0x9F]
    assert chatglm.token_bytes(blank(3)) == b"   "
    assert chatglm.token_bytes(GMASK) == b"[gMASK]"


@settings(max_examples=200, deadline=None)
@given(st.text("ab你 \n\t👋", max_size=20))
def test_every_character_is_somebodys(chatglm: Tokenizer, text: str) -> None:
    ids, spans = chatglm.codec.encode_spans(text, first=True)
    assert chatglm.encode(text) == ids
    assert chatglm.decode(ids) == text
    assert {place for a, b in spans for place in range(a, b)} == set(range(len(text)))
    for id, (start, end) in zip(ids, spans, strict=True):
        if SIZE <= id < BYTES:
            assert chatglm.token_bytes(id).decode() == text[start:end]


@pytest.mark.parametrize("make", [icetk, later])
def test_images_come_before_the_text(tmp_path: Path, make: object) -> None:
    """The first ChatGLM-6B and GLM-130B: [MASK] 150000 of 20,000 + 130,000."""
    model = icetk() if make is icetk else later()
    tokenizer = Tokenizer.load(folder(tmp_path / "glm", model))
    ids = [20_000 + id for id in (WORD_A, BREAK, blank(3), TAB, GMASK, SOP)]
    assert tokenizer.encode("a\n   \t[gMASK]<sop>", specials=True)[: len(ids)] == ids
    assert tokenizer.size == 20_000 + SIZE + 344
    assert tokenizer.decode([5, *ids]) == "a\n   \t"
    tokenizer.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.size, again.special_ids) == (tokenizer.size, tokenizer.special_ids)
    assert again.encode("a\n  b") == tokenizer.encode("a\n  b")


@pytest.mark.parametrize("number", ["many", -1, 10**12])
def test_images_without_number_are_refused(tmp_path: Path, number: int | str) -> None:
    with pytest.raises(FileError, match="must be a number from 0 to 20,000"):
        Tokenizer.load(folder(tmp_path / "glm", later(), num_image_tokens=number))


def test_the_first_files_names_of_the_marks_count_for_nothing(tmp_path: Path) -> None:
    said = {"bos_token": "sop", "eos_token": "eos", "num_image_tokens": 0}
    tokenizer = Tokenizer.load(folder(tmp_path / "glm", later(), **said))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (SOP, EOP)


def test_saved_and_fewer(chatglm: Tokenizer, tmp_path: Path) -> None:
    chatglm.save(tmp_path / "saved")
    assert reading.find(tmp_path / "saved") == tmp_path / "saved" / "tokenizer.model"
    again = Tokenizer.load(tmp_path / "saved")
    text = "a\n   b\t你👋"
    assert isinstance(again.codec, IceCodec)
    assert (again.encode(text), again.size) == (chatglm.encode(text), chatglm.size)
    assert again.prompt(text) == chatglm.prompt(text)
    keep = sorted(chatglm.codec.closure(set(chatglm.encode(text))))
    fewer = chatglm.only(keep)
    assert fewer.size == len(keep) < chatglm.size
    assert [keep[id] for id in fewer.encode(text)] == chatglm.encode(text)
    fewer.save(tmp_path / "fewer")
    assert Tokenizer.load(tmp_path / "fewer").encode(text) == fewer.encode(text)
    with pytest.raises(FileError, match="rules of white space"):
        chatglm.gguf_metadata()


def test_a_plain_text_waits_for_its_answer(chatglm: Tokenizer) -> None:
    """The published tokenizer puts [gMASK]<sop> behind every text."""
    assert chatglm.prompt("你好") == [SPACE, NI, HAO, GMASK, SOP]
    assert chatglm.prompt("") == [GMASK, SOP]


def test_a_conversation(chatglm: Tokenizer) -> None:
    """What is asked and answered is written by itself, each with its own ▁, as in ptuning/main.py."""
    assert chatglm.chat_template == templates.read("chatglm")
    talk = [{"role": "user", "content": "a\n  b"}, {"role": "assistant", "content": "你好"}]
    asked = [WORD_A, BREAK, blank(2), B, GMASK, SOP]
    assert render(chatglm, talk[:1], reply=True).ids == asked
    whole = render(chatglm, talk)
    assert whole.ids == [*asked, SPACE, NI, HAO, EOP]
    assert show_plain(whole, chatglm) == " a\n  b[gMASK]<sop>⟦ 你好<eop>⟧"


@pytest.mark.parametrize("mark", ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "</s>"])
def test_no_text_writes_a_mark(chatglm: Tokenizer, mark: str) -> None:
    """[MASK] would move the positions, <sop> would end the context."""
    talk = [{"role": "user", "content": f"a{mark}\n{mark}b"}]
    ids = render(chatglm, talk, reply=True).ids
    assert [id for id in ids if id in chatglm.special_ids] == [GMASK, SOP]
    assert mark in chatglm.decode(ids)
