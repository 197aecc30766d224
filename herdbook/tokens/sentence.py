"""SentencePiece models: reading and writing their file, and encoding with them.

A `.model` file is one protocol buffer, `ModelProto`. A GGUF file with `tokenizer.ggml.model = llama`
holds the same pieces, scores and types, so it is turned back into such a buffer in memory and the
SentencePiece library itself does the encoding. That is exact where a translation into BPE merges is
not: pieces of equal score (the Chinese pieces that were appended to LLaMA's all score 0) merge from
the left, which no order of merges can say.

    ModelProto   1: pieces (1: piece, 2: score, 3: type)*   2: trainer   3: normaliser
    trainer      3: model_type (1 unigram, 2 BPE)  35: byte_fallback  40..43: ids of unk, bos, eos, pad
    normaliser   1: name  2: character map  3: add_dummy_prefix  4: remove_extra_whitespaces

Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from herdbook.errors import FileError
from herdbook.tokens.settings import MOST_IDS

if TYPE_CHECKING:
    import sentencepiece

#: types of a piece, the same numbers in SentencePiece and in GGUF
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
UNIGRAM, BPE = 1, 2
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of(piece: str) -> int | None:
    """The byte that a fallback piece stands for: "<0x0A>" → 10."""
    found = _BYTE_PIECE.fullmatch(piece)
    return int(found[1], 16) if found else None


def made(piece: str, best: Callable[[str, str], float | None]) -> set[str]:
    """Everything that merging makes on the way to `piece`, from its characters on.

    best(left, right): which neighbours merge first, the lowest; None for never. What is merged inside
    a token does not hang on the text around it, for no merge ever reached over the token's edges.
    """
    symbols, out = list(piece), set(piece)
    while True:
        found = [(best(a, b), at) for at, (a, b) in enumerate(pairwise(symbols))]
        possible = [(order, at) for order, at in found if order is not None]
        if not possible:
            return out
        _, at = min(possible)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        out.add(symbols[at])


@dataclass(frozen=True)
class PieceModel:
    """What a SentencePiece model knows, as plain lists (index = token id)."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    kind: int = BPE
    dummy_prefix: bool = True  # "Hello" is encoded like " Hello"
    squeeze: bool = False  # runs of spaces become one (remove_extra_whitespaces)
    character_map: bytes = b""  # the compiled normaliser (NFKC), empty for none
    ids: dict[str, int] = field(default_factory=dict)  # "unk", "bos", "eos", "pad"

    @classmethod
    def parse(cls, data: bytes) -> PieceModel:
        """Read a serialised ModelProto. ValueError or TypeError when it is none."""
        pieces, scores, types = [], [], []
        trainer: dict[int, int | bytes] = {}
        normaliser: dict[int, int | bytes] = {}
        for number, value in _fields(data):
            if number == 1:
                one = dict(_fields(_bytes(value)))
                pieces.append(_bytes(one.get(1, b"")).decode())
                scores.append(struct.unpack("<f", _bytes(one.get(2, b"\0" * 4)))[0])
                types.append(_number(one.get(3, NORMAL)))
                if len(types) > MOST_IDS:
                    raise ValueError(f"more than {MOST_IDS:,} pieces")
            elif number == 2:
                trainer = dict(_fields(_bytes(value)))
            elif number == 3:
                normaliser = dict(_fields(_bytes(value)))
        if not pieces:
            raise ValueError("no pieces")
        return cls(
            pieces,
            scores,
            types,
            kind=_number(trainer.get(3, UNIGRAM)),
            dummy_prefix=bool(normaliser.get(3, 1)),
            squeeze=bool(normaliser.get(4, 1)),
            character_map=_bytes(normaliser.get(2, b"")),
            ids={
                name: _number(trainer.get(40 + i, standard))
                for i, (name, standard) in enumerate([("unk", 0), ("bos", 1), ("eos", 2)])
            },
        )

    def serialise(self) -> bytes:
        """The ModelProto of these pieces, ready for the SentencePiece library."""
        out = bytearray()
        for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True):
            one = _field(1, piece.encode()) + _field(2, struct.pack("<f", score), wire=5)
            out += _field(1, one + _field(3, kind))
        fallback = int(BYTE in self.types)
        unknown = self.types.index(UNKNOWN) if UNKNOWN in self.types else self.ids.get("unk", 0)
        trainer = _field(3, self.kind) + _field(35, fallback) + _field(40, unknown)
        trainer += b"".join(
            _field(41 + i, self.ids.get(name, -1)) for i, name in enumerate(["bos", "eos", "pad"])
        )
        normaliser = _field(1, b"nmt_nfkc" if self.character_map else b"identity")
        normaliser += _field(2, self.character_map)
        normaliser += _field(3, int(self.dummy_prefix)) + _field(4, int(self.squeeze))
        return bytes(out + _field(2, trainer) + _field(3, normaliser))

    def merges(self) -> list[tuple[str, str]]:
        """BPE merges that say nearly the same, best first: for a tokenizer.json.

        A piece is reached by every split of it into two pieces; a higher score merges earlier. Splits
        with a longer left half come first, as merging from the left would meet them.
        """
        known = {
            piece: score
            for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True)
            if kind in (NORMAL, USER_DEFINED, UNUSED)
        }
        found = []
        for id, piece in enumerate(self.pieces):
            if piece not in known or self.types[id] != NORMAL:
                continue
            for cut in range(len(piece) - 1, 0, -1):
                if piece[:cut] in known and piece[cut:] in known:
                    found.append((-known[piece], id, -cut, (piece[:cut], piece[cut:])))
        return [pair for *_, pair in sorted(found)]

    @cached_property
    def tied(self) -> bool:
        """Whether pieces score the same, so that no order of merges says which one comes first.

        Runs of one character (LLaMA's spaces) do not count: they grow alike either way.
        """
        scores = [
            score
            for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True)
            if kind == NORMAL and len(piece) > 1 and piece != piece[0] * len(piece)
        ]
        return len(set(scores)) < len(scores)

    @cached_property
    def translates(self) -> bool:
        """Whether merges in a tokenizer.json say exactly the same as this model."""
        plain = not self.character_map and not self.squeeze
        return self.kind == BPE and plain and not self.tied

    @cached_property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        import sentencepiece  # many tokenizers need none

        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.serialise())
        except RuntimeError as error:
            raise FileError(
                f"the SentencePiece vocabulary of {len(self.pieces):,} pieces",
                rule=f"is refused by the library: {error}",
                next="take the tokenizer from the model's original folder",
            ) from error

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.processor.encode(text)
        return ids

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [start, end) of `text` that each stands for.

        A token without characters of its own (the added space, all but the last byte of a character
        that was spelled in bytes) has start == end.
        """
        data = self.processor.encode(text, out_type="serialized_proto")
        at_byte = []  # character index of every byte offset
        for index, character in enumerate(text):
            at_byte += [index] * len(character.encode())
        at_byte.append(len(text))
        ids, spans = [], []
        for number, value in _fields(data):
            if number == 2:
                one = {k: v for k, v in _fields(_bytes(value)) if k in (2, 4, 5)}
                ids.append(_number(one.get(2, 0)))
                spans.append((at_byte[_number(one.get(4, 0))], at_byte[_number(one.get(5, 0))]))
        return ids, spans


# --- the wire format of protocol buffers: tag = field number · 8 + wire type, then the value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        wire = tag & 7
        value: int | bytes
        if wire == 0:
            value, at = _read_varint(data, at)
        else:
            if wire == 2:
                size, at = _read_varint(data, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            if at + size > len(data):
                raise ValueError("a field reaches past the end")
            value = data[at : at + size]
            at += size
        yield tag >> 3, value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers as 64-bit two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | bytes, wire: int = 2) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    size = _varint(len(value)) if wire == 2 else b""
    return _varint(number << 3 | wire) + size + value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number where bytes belong")
    return value


def _number(value: int | bytes) -> int:
    """A varint as int32 (ids may be -1)."""
    if not isinstance(value, int):
        raise TypeError("bytes where a number belongs")
    return value - (1 << 64) if value >= 1 << 63 else value
