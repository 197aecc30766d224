"""Real vocabularies of each kind against the libraries they were made for, or a plain twin."""

from __future__ import annotations

import ast
import base64
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from transformers import GPT2Tokenizer

from herdbook.files import gguf
from herdbook.tokens import bytebpe
from herdbook.tokens.tokenizer import Tokenizer
from tests.oracles.test_tokens_vectors import SEPARATOR

SharedData = Callable[[str], Path]

# As the models' own code has them (Meta's llama3/tokenizer.py, Qwen's tokenization_qwen.py).
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
TIKTOKEN = {
    "llama-bpe": ("tokenizer.model", 128_000, _HEAD + r"|\p{N}{1,3}" + _TAIL),
    "qwen2": ("qwen.tiktoken", 151_643, _HEAD + r"|\p{N}" + _TAIL),
}


def real_texts(shared_data: SharedData) -> list[str]:
    play = shared_data("text/tinyshakespeare.txt").read_text(encoding="utf-8")[:60_000]
    poems = shared_data("text/tang300.jsonl").read_text(encoding="utf-8")[:30_000]
    return [play, poems]


def odd_texts(count: int) -> list[str]:
    """Characters from all over Unicode, blanks and plain letters mixed."""
    draw = random.Random(0)
    ranges = [(32, 127), (32, 127), (0x4E00, 0x9FFF), (0x80, 0xD800), (0xE000, 0x1FFFF)]
    texts = []
    for _ in range(count):
        chosen = draw.choices([*ranges, (9, 14), (32, 33)], k=draw.randint(0, 30))
        texts.append("".join(chr(draw.randrange(*one)) for one in chosen))
    return texts


@pytest.mark.parametrize("name", TIKTOKEN)
def test_ranks_as_tiktoken_reads_them(name: str, shared_data: SharedData, tmp_path: Path) -> None:
    """The original file, made again from the GGUF's tokens (a token's id is its rank)."""
    file, count, pattern = TIKTOKEN[name]
    path = shared_data(f"tokenizers/gguf/ggml-vocab-{name}.gguf")
    tokens = gguf.read(path).metadata["tokenizer.ggml.tokens"]
    ranks = {bytebpe.spelled(token): rank for rank, token in enumerate(tokens[:count])}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (tmp_path / file).write_text("".join(lines))
    tokenizer = Tokenizer.load(tmp_path)
    if name == "llama-bpe":
        special = {token: count + place for place, token in enumerate(tokens[count:])}
    else:
        special = {token: count + place for place, token in enumerate(tokens[count : count + 3])}
    library = tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    composed = name == "qwen2"  # its own code brings text into the composed form first
    for text in [*real_texts(shared_data), *odd_texts(2000), "x<|im_end|>y<|eot_id|>z"]:
        plain = unicodedata.normalize("NFC", text) if composed else text
        assert tokenizer.encode(text) == library.encode_ordinary(plain), text[:80]
        assert tokenizer.encode(text, specials=True) == library.encode(plain, allowed_special="all")
        assert tokenizer.decode(tokenizer.encode(text)) == plain
    assert {text: id for text, id in special.items() if id not in tokenizer.special_ids} == {}
    # llama.cpp's vectors for the same vocabulary, from other files
    cases = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    for text, line in zip(cases, Path(f"{path}.out").read_text().split("\n"), strict=True):
        assert tokenizer.encode(text) == [int(one) for one in line.split()]


def test_vocabulary_and_merges_as_transformers_reads_them(
    shared_data: SharedData, tmp_path: Path
) -> None:
    metadata = gguf.read(shared_data("tokenizers/gguf/ggml-vocab-gpt-2.gguf")).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *metadata["tokenizer.ggml.merges"], ""])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer.load(tmp_path)
    peer = GPT2Tokenizer.from_pretrained(tmp_path)
    for text in [*real_texts(shared_data), *odd_texts(1000)]:
        expected = peer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == list(expected), text[:80]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|endoftext|>", specials=True)[-1] == 50256 == tokenizer.eos_id


def test_unigram_saved_as_tokenizer_json(shared_data: SharedData, tmp_path: Path) -> None:
    """A unigram model with NFKC: tokenizer.model is read back, tokenizer.json says the same."""
    path = shared_data("tokenizers/chinese_sp.model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    Tokenizer.load(path).save(tmp_path)
    exact = Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").rename(tmp_path / "away")
    translated = Tokenizer.load(tmp_path)
    lines = [line for text in real_texts(shared_data) for line in text.split("\n")]
    for text in [*lines, *odd_texts(1000), "  Ｆｕｌｌ　ｗｉｄｔｈ ①  x  "]:
        assert exact.encode(text) == library.encode(text), text
        assert translated.encode(text) == library.encode(text), text


def test_ties_are_read_from_the_model_file(shared_data: SharedData, tmp_path: Path) -> None:
    """Pieces of equal score: the tokenizer.json that other tools get is not what we read back."""
    path = shared_data("tokenizers/chinese_llama2_merged.model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    Tokenizer.load(path).save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for text in [*real_texts(shared_data), *odd_texts(500)]:
        assert again.encode(text) == library.encode(text), text[:80]


def test_world_as_a_plain_twin_reads_it(shared_data: SharedData) -> None:
    path = shared_data("tokenizers/rwkv_world_vocab.txt")
    tokenizer = Tokenizer.load(path)
    known: dict[bytes, int] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        id, rest = line.split(" ", 1)
        token = ast.literal_eval(rest[: rest.rindex(" ")])
        known[token.encode() if isinstance(token, str) else token] = int(id)
    longest = max(map(len, known))

    def plain(data: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(data):
            end = next(end for end in range(at + longest, at, -1) if data[at:end] in known)
            ids.append(known[data[at:end]])
            at = min(end, len(data))
        return ids

    for text in [*real_texts(shared_data), *odd_texts(1000)]:
        ids = tokenizer.encode(text)
        assert ids == plain(text.encode())
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert (len(known), tokenizer.size) == (65_529, 65_530)


def test_words_as_a_plain_twin_reads_them(shared_data: SharedData) -> None:
    """CPM-Bee: the longest of at most 32 characters; unknown runs as one."""
    path = shared_data("tokenizers/cpm_bee_vocab.txt")
    tokenizer = Tokenizer.load(path)
    names = path.read_text(encoding="utf-8").split("\n")[:-1]
    known = {name: id for id, name in enumerate(names)}
    known |= {"\n": known.pop("</n>"), " ": known.pop("</_>")}
    special = {name for name in known if name.startswith("<") and name.endswith(">")}
    unknown = 0
    for text in [*real_texts(shared_data), *odd_texts(500)]:
        expected: list[tuple[int, str]] = []
        at = 0
        while at < len(text):
            ends = range(min(at + 32, len(text)), at, -1)
            fits = (text[at:end] for end in ends if text[at:end] in known)
            piece = next((one for one in fits if one not in special), "")
            if piece:
                expected.append((known[piece], piece))
            elif expected and expected[-1][0] == known["<unk>"]:
                expected[-1] = (known["<unk>"], expected[-1][1] + text[at])
            else:
                expected.append((known["<unk>"], text[at]))
            at += len(piece) or 1
        ids, spans = tokenizer.codec.encode_spans(text, first=True)
        assert ids == [id for id, _ in expected]
        assert [text[start:end] for start, end in spans] == [piece for _, piece in expected]
        unknown += ids.count(known["<unk>"])
        if known["<unk>"] not in ids:
            assert tokenizer.decode(ids) == text
    assert unknown > 0
