"""Byte-level BPE from files without a tokenizer.json: tiktoken's ranks, and vocab.json with merges.txt.

A tiktoken file is a list of tokens, the best first; any two neighbours whose bytes together are a token
merge, the lowest rank before all others:

    IQ== 0                base64 of "!", its rank
    ICAgIA== 256

The `tokenizers` library wants to hear of each merge. So every cut of a token into two tokens becomes
one, in the order of the tokens. How the text is cut beforehand and which special tokens follow is
nowhere in the file: LLaMA 3's and Qwen's are known by their number of ranks.

    meta-llama/Meta-Llama-3-8B/original/tokenizer.model   128,000 ranks + 256 special tokens
    Qwen/Qwen-7B/qwen.tiktoken                            151,643 ranks + 208

Source of the lists: the models' own tokenizer.py and tokenization_qwen.py.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from herdbook.errors import FileError
from herdbook.files.foreign import read_bytes, read_json
from herdbook.tokens import bytebpe
from herdbook.tokens.bytebpe import ALPHABET, CUTS, Cut
from herdbook.tokens.settings import FILE_LIMIT, need_ids

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n?")


@dataclass(frozen=True)
class Known:
    """What a tiktoken file of so many ranks does not say."""

    cut: Cut
    specials: tuple[str, ...]  # their ids follow the last rank
    bos: str | None
    eos: str


def _reserved(first: int, last: int) -> list[str]:
    return [f"<|reserved_special_token_{number}|>" for number in range(first, last + 1)]


KNOWN = {
    128_000: Known(
        CUTS["llama-bpe"],
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            *_reserved(0, 3),
            "<|start_header_id|>",
            "<|end_header_id|>",
            *_reserved(4, 4),
            "<|eot_id|>",
            *_reserved(5, 250),
        ),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
    ),
    151_643: Known(
        CUTS["qwen2"],
        (
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            *(f"<|extra_{number}|>" for number in range(205)),
        ),
        bos=None,
        eos="<|endoftext|>",
    ),
}


def is_ranks(path: Path) -> bool:
    """Whether the file begins as a tiktoken file does (SentencePiece's begin with a newline)."""
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(1000)) is not None


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of a tiktoken file by rank."""
    tokens: list[bytes] = []
    for number, line in enumerate(read_bytes(path, FILE_LIMIT).split(b"\n"), start=1):
        if not line.strip():
            continue
        if not _LINE.fullmatch(line):
            raise FileError(
                f"{path}, line {number}: {line[:60]!r}",
                rule="is no line of a tiktoken file (base64, a space, a rank)",
                next="fetch the file again; it may be cut off",
            )
        code, rank = line.split()
        if int(rank) != len(tokens):
            raise FileError(
                f"{path}, line {number}: rank {int(rank)}",
                rule=f"where {len(tokens)} was due",
                next="fetch the file again; it may be cut off",
            )
        try:
            tokens.append(base64.b64decode(code, validate=True))
        except ValueError as error:
            raise FileError(
                f"{path}, line {number}: {code[:60]!r}", rule=f"is no base64: {error}"
            ) from error
    if len(set(tokens)) < len(tokens) or not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise FileError(
            f"{path}: {len(tokens):,} ranks",
            rule="must be of different tokens, the 256 bytes among them",
            next="fetch the file again",
        )
    return tokens


def known(path: Path, ranks: int) -> Known:
    """How a file of so many ranks is to be used."""
    if ranks not in KNOWN:
        counts = " and ".join(f"{count:,}" for count in KNOWN)
        raise FileError(
            f"{path} has {ranks:,} ranks",
            rule=f"and nothing in it says how text is cut; known are the files of {counts} ranks "
            "(LLaMA 3, Qwen)",
            next="take a tokenizer.json of the same model",
        )
    return KNOWN[ranks]


def build(tokens: Sequence[bytes], cut: Cut, added: Sequence[AddedToken]) -> Library:
    """The tokenizer that merges by rank, as tiktoken does; `added` get the ids after the ranks."""
    spelled = ["".join(ALPHABET[byte] for byte in token) for token in tokens]
    have = set(spelled)
    merges = [
        f"{token[:at]} {token[at:]}"
        for token in spelled
        for at in range(len(token) - 1, 0, -1)
        if token[:at] in have and token[at:] in have
    ]
    # tiktoken takes a piece that is a token as it is
    return bytebpe.build(spelled, merges, added, dataclasses.replace(cut, whole_words=True))


def read_merges(path: Path, tokenizer_class: str, added: Mapping[int, AddedToken]) -> Library:
    """vocab.json with merges.txt beside it: GPT-2, MOSS, CodeGen, and Qwen 2 where its class says so."""
    beside = path.parent / "merges.txt"
    if not beside.is_file():
        raise FileError(
            f"{path}", rule="has no merges.txt beside it", next="copy it from the original model"
        )
    try:
        vocabulary: dict[str, int] = read_json(path, FILE_LIMIT)
        lines = read_bytes(beside, FILE_LIMIT).decode().split("\n")
        need_ids(path, vocabulary.values())
        names = {id: token.content for id, token in added.items()}
        names |= {id: token for token, id in vocabulary.items()}
        tokens = [names.get(id, f"[PAD{id}]") for id in range(max(names) + 1)]
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(
            f"{path}, {beside.name}",
            rule=f"hold no vocabulary and merges: {error}",
            next="fetch both again",
        ) from error
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [line.rstrip("\r") for line in lines if line.strip()]
    cut = CUTS["qwen2" if tokenizer_class.startswith("Qwen2") else "gpt-2"]
    return bytebpe.build(tokens, merges, [one for _, one in sorted(added.items())], cut)
