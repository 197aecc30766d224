"""What a kind of tokenizer must be able to do. `Tokenizer` adds special tokens, streams and settings.

    LibraryCodec   library.py   the `tokenizers` library: byte-level BPE, "▁" pieces of a tokenizer.json
    PieceCodec     pieces.py    the `sentencepiece` library: BPE and unigram models, GGUF's llama
    IceCodec       ice.py       the same with tokens of white space: ChatGLM-6B, GLM-130B
    LongestCodec   longest.py   the longest token first: RWKV's World vocabulary, CPM-Bee's words

A codec reads plain text; it is told nothing of special tokens but their names and ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken

Span = tuple[int, int]


class Codec(Protocol):
    """Plain text ↔ ids."""

    @property
    def size(self) -> int:
        """Ids are below it."""

    @property
    def strip(self) -> bool:
        """Whether a space is put before the text, which decoding takes away again."""

    def encode(self, text: str) -> list[int]: ...

    def encode_spans(self, text: str, *, first: bool) -> tuple[list[int], list[Span]]:
        """Ids, and the characters [start, end) that each stands for. first: the text's beginning.

        A token without characters of its own (an added space, all but one byte of a character that
        was spelled in bytes) may have start == end.
        """

    def parse(self, text: str) -> tuple[list[int], list[Span]] | None:
        """The same with special tokens parsed as the library does; None where it does not."""

    def spell(self, id: int) -> bytes:
        """The bytes that a token stands for; b"" for an id of no token."""

    def fallback(self, id: int) -> bool:
        """Whether the token is one of 256 bytes beside which an ordinary token may spell the same."""

    def within(self, data: bytes) -> list[int]:
        """Ids that spell `data` in the middle of a text: no space is put before it."""

    def closure(self, ids: set[int]) -> set[int]:
        """`ids` and all that must stay so that texts made of them are encoded as before."""

    def only(self, keep: Sequence[int]) -> Codec:
        """The same with these tokens alone: token keep[i] gets the id i."""

    def save(self, folder: Path, bos: int | None) -> None:
        """Write its own files. bos: put before every text by other tools."""

    def gguf(self, special_ids: frozenset[int]) -> dict[str, Any]:
        """Its part of GGUF's tokenizer.* keys."""


@dataclass(frozen=True)
class Parts:
    """What a reader finds in a file: all that a Tokenizer is made of."""

    codec: Codec
    specials: Mapping[str, AddedToken]  # the special tokens by their text
    special_ids: Mapping[str, int]
    bos_id: int | None = None
    eos_id: int | None = None
    ends: Sequence[int] = ()  # further ids that end a reply
    add_bos: bool = False  # whether the model expects BOS before plain text
    chat_template: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json
    metadata: Mapping[str, Any] = field(default_factory=dict)  # a GGUF's tokenizer.* keys


def plain_specials(texts: Sequence[str]) -> dict[str, AddedToken]:
    """Special tokens that swallow no blanks. ChatGLM's "sop" stands alone, not in "philosophy"."""
    return {
        text: AddedToken(text, normalized=False, special=True, single_word=text in ("sop", "eop"))
        for text in texts
    }


def bytes_to_characters(text: str) -> list[int]:
    """For every byte offset of the UTF-8 text, and its end, the index of its character."""
    at: list[int] = []
    for index, character in enumerate(text):
        at += [index] * len(character.encode())
    at.append(len(text))
    return at
