"""The tokenizer of ChatGLM-6B and GLM-130B: a SentencePiece model to which white space is tokens too.

    "a\n    b\t"  →  ▁a  <n>  <|blank_4|>  b  <|tab|>

A line break, a tab and runs of 2 to 80 blanks are written as such pieces before the model sees the text;
of a longer run the first 80 go first, and a blank that is left over stays one.

icetk's own file (GLM-130B, the first ChatGLM-6B) ends with the ordinary pieces; ChatGLM-6B's later file
holds what goes behind them, with the same numbers. With n ordinary pieces, 130,000 in both:

    n … n+7       [MASK] [gMASK] [sMASK] <unused_0> <sop> <eop> <ENC> <dBLOCK>
    n+8           <|tab|>
    n+9 … n+87    <|blank_2|> … <|blank_80|>
    n+88 …        the 256 bytes

Text's ids count from `num_image_tokens` on: 20,000, where the settings do not say 0.

Sources: tokenization_chatglm.py of https://huggingface.co/THUDM/chatglm-6b (both revisions);
https://github.com/THUDM/icetk.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from herdbook.errors import FileError
from herdbook.files.atomic import write_bytes
from herdbook.tokens.codec import Parts, Span, plain_specials
from herdbook.tokens.pieces import PieceCodec
from herdbook.tokens.sentence import (
    BYTE,
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PieceModel,
)
from herdbook.tokens.settings import Settings

FILE = "ice_text.model"
#: ids below the text's where the settings do not say how many
IMAGES = 20_000
LONGEST = 80  # blanks in one token
BREAK, TAB = "<n>", "<|tab|>"
SPECIALS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>"),
    *("<sop>", "<eop>", "<ENC>", "<dBLOCK>"),
)
_BLANKS = {f"<|blank_{count}|>": " " * count for count in range(2, LONGEST + 1)}
_MEANT = {BREAK: "\n", TAB: "\t", **_BLANKS}
_WRITTEN = {text: piece for piece, text in _MEANT.items()}
_WHITE = re.compile(rf"[\n\t]| {{2,{LONGEST}}}")


def is_ice(path: Path, pieces: PieceModel) -> bool:
    """Whether a model is of this kind: by its name, or by the pieces that the later file has."""
    return path.name == FILE or {BREAK, TAB, "[gMASK]", "<sop>"} <= set(pieces.pieces)


def completed(pieces: PieceModel, images: int) -> PieceModel:
    """The model with what belongs behind its pieces and before them, and its special tokens as such."""
    names, scores, types = list(pieces.pieces), list(pieces.scores), list(pieces.types)
    if TAB not in names:
        more = [(name, CONTROL) for name in SPECIALS]
        more += [(name, USER_DEFINED) for name in (TAB, *_BLANKS)]
        more += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
        names += [name for name, _ in more]
        scores += [0.0] * len(more)
        types += [kind for _, kind in more]
    special = set(SPECIALS)
    types = [CONTROL if name in special else kind for name, kind in zip(names, types, strict=True)]
    return dataclasses.replace(
        pieces,
        pieces=[*(f"<image_{number}>" for number in range(images)), *names],
        scores=[*[0.0] * images, *scores],
        types=[*[UNUSED] * images, *types],
        ids={name: id + images * (id >= 0) for name, id in pieces.ids.items()},
    )


class IceCodec(PieceCodec):
    def encode(self, text: str) -> list[int]:
        return super().encode(_WHITE.sub(_piece, text))

    def encode_spans(self, text: str, *, first: bool) -> tuple[list[int], list[Span]]:
        written, places, at = "", [], 0  # places: of each written character, its own [start, end)
        for white in [*_WHITE.finditer(text), None]:
            start, end = white.span() if white else (len(text), len(text))
            written += text[at:start]
            places += [(place, place + 1) for place in range(at, start)]
            if white:
                written += (piece := _piece(white))
                places += [(start, end)] * len(piece)
            at = end
        places.append((len(text), len(text)))
        ids, spans = super().encode_spans(written, first=first)
        return ids, [(places[a][0], places[b - 1][1] if b > a else places[a][0]) for a, b in spans]

    def spell(self, id: int) -> bytes:
        if 0 <= id < self.size and self.pieces.types[id] == UNUSED:
            return b""  # an image's
        known = super().spell(id)
        return _MEANT.get(known.decode(errors="replace"), "").encode() or known

    def within(self, data: bytes) -> list[int]:
        try:
            return super().within(_WHITE.sub(_piece, data.decode()).encode())
        except UnicodeDecodeError:  # a part of a character
            return super().within(data)

    def only(self, keep: Sequence[int]) -> IceCodec:
        return IceCodec(super().only(keep).pieces)

    def save(self, folder: Path, bos: int | None) -> None:
        """No tokenizer.json: the rules of white space are none that it could hold."""
        write_bytes(folder / "tokenizer.model", self.pieces.serialise())

    def gguf(self, special_ids: frozenset[int]) -> dict[str, Any]:
        raise FileError(
            "ChatGLM-6B's kind of tokenizer",
            rule="cannot be written into a GGUF, which has no place for its rules of white space",
            next="export to a Hugging Face folder instead: --to hf",
        )


def _piece(white: re.Match[str]) -> str:
    return _WRITTEN[white[0]]


def parts(pieces: PieceModel, settings: Settings) -> Parts:
    """ChatGLM-6B's kind. The text's ids are where the published tokenizer has them."""
    images = settings.config.get("num_image_tokens", IMAGES)
    if not isinstance(images, int) or not 0 <= images <= IMAGES:
        raise FileError(
            f"num_image_tokens = {images!r} in tokenizer_config.json",
            rule=f"must be a number from 0 to {IMAGES:,}",
            next="get the file again from the original model",
        )
    pieces = completed(pieces, images)
    special = {
        pieces.pieces[id]: id for id, kind in enumerate(pieces.types) if kind in (CONTROL, UNKNOWN)
    }
    return Parts(
        IceCodec(pieces),
        plain_specials(list(special)),
        special,
        bos_id=special.get("<sop>"),  # the first files call them otherwise
        eos_id=special.get("<eop>"),
        ends=settings.ends,
        chat_template=settings.template,
        config={**settings.config, "num_image_tokens": 0},  # saved, they are pieces like all others
    )
