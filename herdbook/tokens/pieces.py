"""SentencePiece models as a codec: the library itself encodes, so ids are exact by construction.

For other tools a model is written as a tokenizer.json too: a BPE model as merges, a unigram model as
its pieces and scores. Where that cannot say quite the same (`PieceModel.translates`), tokenizer.model
lies beside it and is what Herdbook reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from herdbook.errors import FileError
from herdbook.files.atomic import write_bytes, write_text
from herdbook.tokens import sentence
from herdbook.tokens.codec import Span, plain_specials
from herdbook.tokens.library import bos_first
from herdbook.tokens.sentence import BYTE, CONTROL, UNKNOWN, USER_DEFINED, PieceModel


class PieceCodec:
    def __init__(self, pieces: PieceModel) -> None:
        self.pieces = pieces
        self.size, self.strip = len(pieces.pieces), pieces.dummy_prefix

    def encode(self, text: str) -> list[int]:
        return self.pieces.encode(text)

    def encode_spans(self, text: str, *, first: bool) -> tuple[list[int], list[Span]]:
        """SentencePiece puts its space before every part, wherever that stands."""
        return self.pieces.encode_spans(text)

    def parse(self, text: str) -> tuple[list[int], list[Span]] | None:
        return None

    def spell(self, id: int) -> bytes:
        if not 0 <= id < self.size:
            return b""
        piece, kind = self.pieces.pieces[id], self.pieces.types[id]
        if kind in (CONTROL, UNKNOWN):
            return piece.encode()
        if kind == BYTE and (byte := sentence.byte_of(piece)) is not None:
            return bytes([byte])
        return piece.replace(sentence.SPACE, " ").encode()

    def fallback(self, id: int) -> bool:
        return 0 <= id < self.size and self.pieces.types[id] == BYTE

    @cached_property
    def _within(self) -> PieceModel:
        return dataclasses.replace(
            self.pieces, dummy_prefix=False, squeeze=False, character_map=b""
        )

    def within(self, data: bytes) -> list[int]:
        try:
            return self._within.encode(data.decode())
        except UnicodeDecodeError:  # a part of a character
            names = {piece: id for id, piece in enumerate(self.pieces.pieces)}
            found = [names.get(f"<0x{byte:02X}>") for byte in data]
            return [id for id in found if id is not None]

    # --- fewer tokens

    def closure(self, ids: set[int]) -> set[int]:
        """BPE: the pieces that merging makes on the way to those of `ids`; bytes and special ones.

        Unigram takes the best path through all pieces: without the pieces beside it, it is still the
        best. Only the score of unknown characters hangs on the worst piece, which stays.
        """
        pieces, scores, types = self.pieces.pieces, self.pieces.scores, self.pieces.types
        out = {id for id, kind in enumerate(types) if kind in _NEVER_MADE}
        normal = {piece: id for id, piece in enumerate(pieces) if types[id] not in _NEVER_MADE}

        def best(left: str, right: str) -> float | None:
            id = normal.get(left + right)
            return None if id is None else -scores[id]

        kept = {sentence.SPACE}
        if self.pieces.kind == sentence.UNIGRAM:
            kept.add(min(normal, key=lambda piece: scores[normal[piece]]))
        else:
            for id in ids - out:
                kept |= sentence.made(pieces[id], best)
        return out | ids | {normal[piece] for piece in kept if piece in normal}

    def only(self, keep: Sequence[int]) -> PieceCodec:
        old = self.pieces
        new = {id: place for place, id in enumerate(keep)}
        return PieceCodec(
            dataclasses.replace(
                old,
                pieces=[old.pieces[id] for id in keep],
                scores=[old.scores[id] for id in keep],
                types=[old.types[id] for id in keep],
                ids={name: new.get(id, -1) for name, id in old.ids.items()},
            )
        )

    # --- writing

    def save(self, folder: Path, bos: int | None) -> None:
        write_text(folder / "tokenizer.json", self._library(bos).to_str())
        write_bytes(folder / "tokenizer.model", self.pieces.serialise())

    def _library(self, bos: int | None) -> Library:
        """This model as the `tokenizers` library has it."""
        pieces = self.pieces
        # Of equal pieces the first counts, as in SentencePiece.
        vocabulary: dict[str, int] = {}
        for id, piece in enumerate(pieces.pieces):
            vocabulary.setdefault(piece, id)
        unknown = pieces.types.index(UNKNOWN) if UNKNOWN in pieces.types else None
        bytes_ = BYTE in pieces.types
        clean: list[Any] = []
        if pieces.character_map:
            clean.append(normalizers.Precompiled(pieces.character_map))
        if pieces.squeeze:
            clean += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
        undo: list[Any] = [
            decoders.Replace(sentence.SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
        ]
        if pieces.dummy_prefix:
            undo.append(decoders.Strip(" ", 1, 0))
        if pieces.kind == sentence.UNIGRAM:
            scored = list(zip(pieces.pieces, pieces.scores, strict=True))
            library = Library(models.Unigram(scored, unknown, bytes_))
            scheme = "always" if pieces.dummy_prefix else "never"
            library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        else:
            library = Library(
                models.BPE(
                    vocab=vocabulary,
                    merges=pieces.merges(),
                    unk_token=None if unknown is None else pieces.pieces[unknown],
                    fuse_unk=True,
                    byte_fallback=bytes_,
                )
            )
            if pieces.dummy_prefix:
                clean.append(normalizers.Prepend(sentence.SPACE))
            clean.append(normalizers.Replace(" ", sentence.SPACE))
        if clean:
            library.normalizer = normalizers.Sequence(clean)
        library.decoder = decoders.Sequence(undo)
        added = [
            plain_specials([piece])[piece]
            if kind in (CONTROL, UNKNOWN)
            else AddedToken(piece, normalized=False)
            for piece, kind in zip(pieces.pieces, pieces.types, strict=True)
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
        library.add_tokens(added)
        if bos is not None:
            library.post_processor = bos_first(pieces.pieces[bos], bos)
        return library

    def gguf(self, special_ids: frozenset[int]) -> dict[str, Any]:
        if self.pieces.kind != sentence.BPE or self.pieces.character_map:
            raise FileError(
                "this SentencePiece model (unigram, or with a normaliser of its own)",
                rule="cannot be written into a GGUF as llama.cpp reads it",
                next="export to a Hugging Face folder instead: --to hf",
            )
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": list(self.pieces.pieces),
            "tokenizer.ggml.scores": list(self.pieces.scores),
            "tokenizer.ggml.token_type": list(self.pieces.types),
            "tokenizer.ggml.add_space_prefix": self.pieces.dummy_prefix,
            "tokenizer.ggml.unknown_token_id": self.pieces.ids.get("unk", 0),
        }


#: types of pieces that no merge makes
_NEVER_MADE = (UNKNOWN, CONTROL, USER_DEFINED, BYTE)
