"""Longest match: against a plain twin, and what its two kinds of file say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.errors import FileError
from herdbook.tokens import templates
from herdbook.tokens.longest import Longest
from herdbook.tokens.tokenizer import Tokenizer

WORDS = ["<pad>", "<unk>", "</n>", "</_>", "<s>", "</s>", "<ans>"]
WORDS += ["a", "b", "ab", "abab", "b ", " a", "<", ">", "好", "你好", "a你"]


def plain_cut(known: set[str], text: str) -> list[str]:
    """The definition: at each place the longest known piece, else one unit."""
    out = []
    while text:
        fits = [text[:end] for end in range(len(text), 0, -1) if text[:end] in known]
        out.append(fits[0] if fits else text[:1])
        text = text[len(out[-1]) :]
    return out


@settings(max_examples=300, deadline=None)
@given(
    st.sets(st.text("ab你", min_size=1, max_size=6), min_size=1, max_size=12),
    st.text("ab你c", max_size=30),
)
def test_the_longest_piece_as_the_plain_twin_has_it(known: set[str], text: str) -> None:
    ids = {piece: id for id, piece in enumerate(sorted(known))}
    found = list(Longest(ids).cut(text))
    assert [text[start:end] for start, end, _ in found] == plain_cut(known, text)
    assert [id for *_, id in found] == [ids.get(piece) for piece in plain_cut(known, text)]
    raw = {piece.encode(): id for piece, id in ids.items()}
    pieces = [text.encode()[start:end] for start, end, _ in Longest(raw).cut(text.encode())]
    assert b"".join(pieces) == text.encode()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """RWKV's file with the 256 bytes (id = byte + 1) and a few words."""
    lines = [f"{byte + 1} {chr(byte)!r} 1" for byte in range(128)]
    lines += [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(128, 256)]
    lines += ["257 ' the' 4", "258 '你好' 6", "259 b'\\xe4\\xbd' 2", "260 '  ' 2", "261 'the' 3"]
    path = tmp_path_factory.mktemp("world") / "rwkv_vocab_v20230424.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return Tokenizer.load(path)


def test_world(world: Tokenizer) -> None:
    assert world.encode("the the 你好 你们") == [261, 257, 33, 258, 33, 259, 0xA0 + 1, *spell("们")]
    assert (world.bos_id, world.eos_id, world.size, world.stop_ids) == (None, 0, 262, {0})
    assert world.token_bytes(0) == b"<|endoftext|>"
    assert world.token_bytes(999) == b""
    assert world.encode("a<|endoftext|>b", specials=True) == [98, 0, 99]
    assert world.decode([98, 0, 99]) == "ab"


def spell(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text("the 你好们\n", max_size=40))
def test_any_text_survives_world(world: Tokenizer, text: str) -> None:
    ids, spans = world.encode_spans(text)
    assert world.encode(text) == ids or "<|endoftext|>" in text
    assert world.decode(world.encode(text)) == text
    assert b"".join(map(world.token_bytes, world.encode(text))) == text.encode()
    assert {place for a, b in spans for place in range(a, b)} == set(range(len(text)))


@settings(max_examples=300, deadline=None)
@given(st.text("ab你好 \n<>cß", max_size=30))
def test_words_and_what_they_do_not_know(words: Tokenizer, text: str) -> None:
    ids, spans = words.codec.encode_spans(text, first=True)
    known = {word for word in WORDS if not (word[0] == "<" and len(word) > 1)} | {" ", "\n"}
    expected: list[str | None] = []
    for piece in plain_cut(known, text):
        if piece in known:
            expected.append(piece)
        elif not expected or expected[-1] is not None:
            expected.append(None)  # a run of unknown characters is one token
    assert len(ids) == len(expected)
    for id, (start, end), piece in zip(ids, spans, expected, strict=True):
        assert piece is None or words.token_bytes(id).decode() == piece == text[start:end]
        assert (id == 1) == (piece is None)
    assert "".join(text[start:end] for start, end in spans) == text
    if None not in expected:
        assert words.decode(ids) == text
        assert b"".join(map(words.token_bytes, ids)) == text.encode()


def test_words_special_tokens(words: Tokenizer) -> None:
    assert (words.bos_id, words.eos_id) == (4, 5)
    assert words.encode("<ans>", specials=True) == [6]
    assert words.encode("<a>") == [WORDS.index("<"), WORDS.index("a"), WORDS.index(">")]
    assert words.encode("</n>")[0] == WORDS.index("<")  # plain text stays plain
    assert words.encode("\n ") == [2, 3]


@pytest.mark.parametrize("kind", ["world", "words"])
def test_saved_and_fewer(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    text = "the ab 你好 the\n"
    tokenizer.save(tmp_path / "all")
    again = Tokenizer.load(tmp_path / "all")
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.size, again.special_ids) == (tokenizer.size, tokenizer.special_ids)
    keep = sorted(tokenizer.codec.closure(set(tokenizer.encode(text))))
    fewer = tokenizer.only(keep)
    assert fewer.size == len(keep) < tokenizer.size
    assert [keep[id] for id in fewer.encode(text)] == tokenizer.encode(text)
    fewer.save(tmp_path / "fewer")
    assert Tokenizer.load(tmp_path / "fewer").encode(text) == fewer.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rwkv_vocab.txt", "1 'a' 1\n2 zzz 3\n", "line 2: b'2 zzz 3' is no line of an RWKV vocab"),
        ("rwkv_vocab.txt", "1 'ab' 1\n", "the length is wrong"),
        ("rwkv_vocab.txt", "0 'a' 1\n", "the id is taken"),
        ("rwkv_vocab.txt", "1 'a' 1\n", "byte 0 and 254 more have no token"),
        ("rwkv_vocab.txt", "1 __import__('os') 1\n", "is no line of an RWKV vocabulary"),
        ("vocab.txt", "<unk>\n</n>\n</_>\na\na\n", "'a' stands there twice"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value)


def test_word_pieces_of_bert_are_not_taken_for_words(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n##ing\n")
    assert not Tokenizer.exists(tmp_path)
    with pytest.raises(FileError, match="is no line of an RWKV vocabulary"):
        Tokenizer.load(tmp_path / "vocab.txt")


def test_a_chat_template_by_the_folders_name(world: Tokenizer, tmp_path: Path) -> None:
    world.save(tmp_path / "rwkv-4-world-7b")
    found = Tokenizer.load(tmp_path / "rwkv-4-world-7b")
    assert (world.chat_template, found.chat_template) == (None, templates.read("rwkv-world"))
    assert found.stop_strings
    found.save(tmp_path / "mine")
    assert Tokenizer.load(tmp_path / "mine").chat_template == found.chat_template
    assert Tokenizer.load(tmp_path / "mine", "{{ 1 }}").chat_template == "{{ 1 }}"
