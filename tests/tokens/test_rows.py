from __future__ import annotations

from pathlib import Path

from herdbook.tokens.rows import rows
from herdbook.tokens.tokenizer import Tokenizer
from tests.tokens.conftest import byte_metadata, piece_metadata

SPACE, H, I, A, B, _H, HI, AB, BA = range(259, 268)  # of the small SentencePiece tokenizer


def test_the_same_tokenizer_keeps_every_row(
    byte_tokenizer: Tokenizer, piece_tokenizer: Tokenizer
) -> None:
    for tokenizer in (byte_tokenizer, piece_tokenizer):
        found = rows(tokenizer, tokenizer)
        assert found.of == [[id] for id in range(tokenizer.size)]
        assert found.new == []


def test_new_pieces_are_made_of_old_ones(piece_tokenizer: Tokenizer) -> None:
    """No space is put before a piece; unknown characters are spelled in bytes; "<0x61>" is not "a"."""
    metadata = piece_metadata()
    new = ["abba", "▁hiab", "é", "<pad>"]
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *new]
    metadata["tokenizer.ggml.scores"] += [0.0] * len(new)
    metadata["tokenizer.ggml.token_type"] += [1, 1, 1, 3]
    extended = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    found = rows(piece_tokenizer, extended)
    size = piece_tokenizer.size
    assert found.of[:size] == [[id] for id in range(size)]
    assert found.of[size] == [AB, BA]
    assert found.of[size + 1] == [HI, AB]
    assert found.of[size + 2] == [3 + byte for byte in "é".encode()]
    assert found.of[size + 3] == [3 + ord(one) if one not in "a" else A for one in "<pad>"]
    assert found.new == [size, size + 1, size + 2, size + 3]
    assert found.of[3 + ord("a")] == [3 + ord("a")]


def test_between_kinds(byte_tokenizer: Tokenizer, piece_tokenizer: Tokenizer) -> None:
    """Byte-level ids for SentencePiece's tokens: what stands for the same bytes has the same row."""
    found = rows(byte_tokenizer, piece_tokenizer)
    assert found.of[A] == [3 + ord("a")]
    assert found.of[3 + 0xF0] == [3 + 0xF0]  # a fallback byte
    assert found.of[HI] == [3 + ord(" "), 3 + ord("h"), 3 + ord("i")]
    assert found.of[1] == [3 + ord(one) for one in "<s>"]  # no such special token there
    back = rows(piece_tokenizer, byte_tokenizer)
    assert back.of[3 + ord("a")] == [A]
    assert back.of[3 + 0xF0] == [3 + 0xF0]
    hello = byte_tokenizer.encode(" Hello")[0]
    assert back.of[hello] == [SPACE, *(3 + ord(one) for one in "Hello")]


def test_fewer_tokens(byte_tokenizer: Tokenizer) -> None:
    keep = [0, 1, 2, *range(3, 259), 262]
    found = rows(byte_tokenizer, byte_tokenizer.only(keep))
    assert found.of == [[id] for id in keep]
    assert found.same == {id: place for place, id in enumerate(keep)}


def test_a_part_of_a_character(byte_tokenizer: Tokenizer, piece_tokenizer: Tokenizer) -> None:
    """A byte-level token may be half a character, which no text spells."""
    metadata = byte_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "äĵ"]
    metadata["tokenizer.ggml.token_type"] += [1]
    halves = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    assert halves.token_bytes(266) == b"\xe4\x93"
    assert rows(piece_tokenizer, halves).of[266] == [3 + 0xE4, 3 + 0x93]
    assert rows(byte_tokenizer, halves).of[266] == [3 + 0xE4, 3 + 0x93]
