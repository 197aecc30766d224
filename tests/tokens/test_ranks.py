"""tiktoken's files: merging by rank against a plain twin; vocab.json with merges.txt."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from herdbook.errors import FileError
from herdbook.tokens import ranks
from herdbook.tokens.bytebpe import ALPHABET, CUTS, Cut
from herdbook.tokens.tokenizer import Tokenizer

BYTES = [bytes([byte]) for byte in range(256)]
WHOLE = Cut(("(?m:.+)",))  # the text is one piece


def plain_merge(known: dict[bytes, int], piece: bytes) -> list[int]:
    """tiktoken's rule: the pair with the lowest rank, the leftmost of equals, until none is left."""
    if piece in known:
        return [known[piece]]
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while True:
        pairs = [(known.get(a + b), at) for at, (a, b) in enumerate(pairwise(parts))]
        found = [(rank, at) for rank, at in pairs if rank is not None]
        if not found:
            return [known[part] for part in parts]
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=2, max_size=6), max_size=14, unique=True),
    st.lists(st.text("ab", max_size=25), min_size=1, max_size=8),
)
def test_merging_by_rank_as_the_plain_twin_does(tokens: list[str], texts: list[str]) -> None:
    order = [*BYTES, *(token.encode() for token in tokens)]
    known = {token: rank for rank, token in enumerate(order)}
    library = ranks.build(order, WHOLE, [])
    for text in texts:
        assert library.encode(text).ids == plain_merge(known, text.encode())


def write_ranks(path: Path, tokens: list[bytes]) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines))


@pytest.fixture
def few_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of 260 ranks, which is known as such for once."""
    known = ranks.Known(CUTS["llama-bpe"], ("<|begin|>", "<|end|>"), "<|begin|>", "<|end|>")
    monkeypatch.setitem(ranks.KNOWN, 260, known)
    path = tmp_path / "tokenizer.model"
    write_ranks(path, [*BYTES, b"ab", b" a", b" ab", "你".encode()])
    return path


def test_a_file_of_ranks(few_ranks: Path) -> None:
    tokenizer = Tokenizer.load(few_ranks.parent)
    assert tokenizer.encode("你!ab ab") == [259, ord("!"), 256, 258]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (260, 261, True)
    assert tokenizer.encode("ab<|end|>", specials=True) == [256, 261]
    few_ranks.rename(few_ranks.with_name("x.tiktoken"))
    assert Tokenizer.load(few_ranks.parent).encode("你!ab ab") == [259, ord("!"), 256, 258]


def test_names_beside_the_ranks_count(few_ranks: Path) -> None:
    beside = {"added_tokens_decoder": {"261": {"content": "<|eot_id|>", "special": True}}}
    (few_ranks.parent / "tokenizer_config.json").write_text(
        json.dumps(beside | {"eos_token": "<|eot_id|>"})
    )
    tokenizer = Tokenizer.load(few_ranks.parent)
    assert tokenizer.encode("<|eot_id|>", specials=True) == [261] == [tokenizer.eos_id]


def test_saved_as_tokenizer_json(few_ranks: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(few_ranks)
    tokenizer.save(tmp_path / "out")
    again = Tokenizer.load(tmp_path / "out")
    draw = random.Random(0)
    for _ in range(100):
        text = "".join(draw.choices("ab 你é12", k=12))
        assert again.encode(text, bos=True) == tokenizer.encode(text, bos=True)
        assert again.decode(again.encode(text)) == text


def test_ranks_that_cannot_be_used(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(FileError) as caught:
            Tokenizer.load(tmp_path)
        return str(caught.value)

    path = tmp_path / "x.tiktoken"
    write_ranks(path, BYTES)
    assert "has 256 ranks and nothing in it says how text is cut" in message()
    write_ranks(path, BYTES[1:])
    assert "255 ranks must be of different tokens, the 256 bytes among them" in message()
    path.write_text("IQ== 0\nIg== 7\n")
    assert "line 2: rank 7 where 1 was due" in message()
    path.write_text("IQ== 0\n<html>\n")
    assert "line 2: b'<html>' is no line of a tiktoken file" in message()
    path.write_text("IQ= 0\n")
    assert "is no base64" in message()


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    """GPT-2's two files, with MOSS's way of adding tokens: ids may leave a gap."""
    names = [ALPHABET[byte] for byte in range(256)] + ["ab", "Ġab"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: id for id, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<eom>": 260, "<eoh>": 259}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<eom>", "additional_special_tokens": ["<eoh>"]})
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab ab c") == [256, 257, ord(" "), ord("c")]
    assert tokenizer.encode("a<eoh><eom>", specials=True) == [ord("a"), 259, 260]
    assert tokenizer.encode("<eom>") == [ord(one) for one in "<eom>"]
    assert (tokenizer.eos_id, tokenizer.size) == (260, 261)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileError, match=r"has no merges\.txt beside it"):
        Tokenizer.load(tmp_path)


def test_qwen2_says_its_cut_by_its_class(tmp_path: Path) -> None:
    names = [ALPHABET[byte] for byte in range(256)] + ["12"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: id for id, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("1 2\n")
    assert Tokenizer.load(tmp_path).encode("12") == [256]
    config = json.dumps({"tokenizer_class": "Qwen2Tokenizer"})
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert Tokenizer.load(tmp_path).encode("12") == [ord("1"), ord("2")]
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    with pytest.raises(FileError, match="hold no vocabulary and merges"):
        Tokenizer.load(tmp_path)


def test_added_tokens_come_last() -> None:
    library = ranks.build(BYTES, WHOLE, [AddedToken("<x>", special=True)])
    assert library.token_to_id("<x>") == 256
