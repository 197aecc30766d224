"""Extend a LLaMA-like tokenizer by the pieces of another, as Chinese-LLaMA and BiLLa were made.

A SentencePiece vocabulary trained on Chinese has words where LLaMA's has two bytes or three for a
character. Those of its pieces that the base does not know are appended in their order, with score 0,
the best there is, so that they merge before the base's own. Ids of the base stay.

    LLaMA's 32,000 + 17,953 of 20,000 Chinese pieces = 49,953

The model's embedding and head then need rows for them (`Refit`), and some training.

Source: https://github.com/ymcui/Chinese-LLaMA-Alpaca (merge_tokenizers.py), arXiv 2304.08177.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.step import Bench, Input, Step, require
from herdbook.errors import DataError, FileError
from herdbook.tokens import ranks, sentence
from herdbook.tokens.pieces import PieceCodec
from herdbook.tokens.sentence import NORMAL, USER_DEFINED, PieceModel
from herdbook.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExtendTokenizer(Step):
    """Append the pieces of one SentencePiece tokenizer that another does not have."""

    kind: ClassVar[str] = "tokenizer"

    #: the one that is extended, or the model that it belongs to
    tokenizer: Input = ""
    #: the one whose pieces are taken
    pieces: Input = ""

    def check(self) -> None:
        require(self, "tokenizer", "pieces")

    def make(self, bench: Bench) -> dict[str, Any]:
        base = load_pieces(bench.artifact("tokenizer").path)
        extended = extend(base, load_pieces(bench.artifact("pieces").path))
        extended.save(bench.out)
        return {
            "vocabulary_before": base.size,
            "added": extended.size - base.size,
            "vocabulary": extended.size,
        }


def load_pieces(path: Path) -> Tokenizer:
    """A SentencePiece tokenizer. A folder's tokenizer.model counts, not its tokenizer.json."""
    folder = path
    for name in ("tokenizer.model", "spiece.model"):
        file = path / name
        if file.is_file() and not ranks.is_ranks(file):
            path = file
            break
    tokenizer = Tokenizer.load(path)
    if not isinstance(tokenizer.codec, PieceCodec):
        raise FileError(
            f"the tokenizer of {path}",
            rule="is no SentencePiece model, and only such a one has pieces to append to or to take",
            next="give the model's original tokenizer.model, or train pieces: herd tokenizer train",
        )
    if path != folder and (whole := Tokenizer.load(folder).size) > tokenizer.size:
        raise FileError(
            f"{path.name} has {tokenizer.size:,} tokens, tokenizer.json beside it {whole:,}",
            rule="and the added ones would lose their ids",
            next="declare them in tokenizer_config.json (added_tokens_decoder) or added_tokens.json",
        )
    return tokenizer


def extend(base: Tokenizer, more: Tokenizer) -> Tokenizer:
    """`base` with the pieces of `more` behind its own. Both are SentencePiece tokenizers."""
    assert isinstance(base.codec, PieceCodec) and isinstance(more.codec, PieceCodec)
    return base.extended(PieceCodec(merge(base.codec.pieces, more.codec.pieces)))


def merge(base: PieceModel, more: PieceModel) -> PieceModel:
    if base.kind != sentence.BPE:
        raise FileError(
            f"a unigram tokenizer of {len(base.pieces):,} pieces",
            rule="cannot be extended: its scores are probabilities, which appended pieces have none of",
            next="extend a BPE tokenizer (LLaMA's kind), or train a larger one",
        )
    known = set(base.pieces)
    added: dict[str, int] = {}
    for piece, kind in zip(more.pieces, more.types, strict=True):
        if kind in (NORMAL, USER_DEFINED) and piece not in known:
            added.setdefault(piece, kind)
    if not added:
        raise DataError(
            f"all {len(more.pieces):,} pieces",
            rule="are known to the tokenizer already: there is nothing to append",
            next="check that the second tokenizer is the one you mean",
        )
    return dataclasses.replace(
        base,
        pieces=[*base.pieces, *added],
        scores=[*base.scores, *[0.0] * len(added)],
        types=[*base.types, *added.values()],
    )
