"""Leave out the tokens that a text does not need: on it, the tokenizer then says the same, in less.

A model for one language or one trade carries rows for all the others; of SmolLM2-135M's parameters
every fifth is one. Kept are

- the tokens of the text, encoded whole and line by line, and of its conversations as the chat template
  renders them;
- what is needed on the way to them (`Codec.closure`): a merge makes parts of the token it ends in;
- special tokens, and the 256 bytes, so that any other text can still be encoded, if in more tokens.

The step checks what it promises: the text is encoded by both, and must give the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.step import Bench, Input, require
from herdbook.errors import ConfigError, GateError
from herdbook.tokens import ranks
from herdbook.tokens.chat import render
from herdbook.tokens.corpus import Corpus, TextStep
from herdbook.tokens.tokenizer import Tokenizer

#: its rendering is kept too, so that the model can still be talked to
GREETING = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@dataclass(frozen=True)
class PruneTokenizer(TextStep):
    """Keep the tokens that your text needs, the special ones and the bytes."""

    kind: ClassVar[str] = "tokenizer"

    #: the one that is pruned, or the model that it belongs to
    tokenizer: Input = ""

    def check(self) -> None:
        super().check()
        require(self, "tokenizer")

    def make(self, bench: Bench) -> dict[str, Any]:
        corpus = self.corpus(bench)
        tokenizer = _load(bench.artifact("tokenizer").path, corpus)
        used = {id for ids in encoded(tokenizer, corpus) for id in ids}
        keep = sorted(tokenizer.codec.closure(used | tokenizer.special_ids))
        if len(keep) >= tokenizer.size:
            raise ConfigError(
                f"all {tokenizer.size:,} tokens",
                rule="are needed by this text: nothing can be left out",
                next="give the text that the model is for, and no more",
            )
        pruned = tokenizer.only(keep)
        check(tokenizer, pruned, keep, corpus)
        pruned.save(bench.out)
        return {
            "vocabulary_before": tokenizer.size,
            "used": len(used),
            "vocabulary": pruned.size,
            "kept_share": pruned.size / tokenizer.size,
        }


def _load(path: Path, corpus: Corpus) -> Tokenizer:
    """The tokenizer; from tokenizer.model, where that says the same as the tokenizer.json beside it, so
    that what is pruned can still be extended."""
    tokenizer = Tokenizer.load(path)
    original = path / "tokenizer.model"
    if original.is_file() and not ranks.is_ranks(original):
        pieces = Tokenizer.load(original)
        pairs = zip(encoded(tokenizer, corpus), encoded(pieces, corpus), strict=True)
        if pieces.size == tokenizer.size and all(a == b for a, b in pairs):
            return pieces
    return tokenizer


def encoded(tokenizer: Tokenizer, corpus: Corpus) -> Iterator[list[int]]:
    """Ids of everything that must stay as it is."""
    for text in corpus:
        yield tokenizer.encode(text)
        for line in text.split("\n"):
            yield tokenizer.encode(line)
    if tokenizer.chat_template is not None:
        yield render(tokenizer, GREETING).ids
        yield render(tokenizer, GREETING[:1], reply=True).ids
        for talk in corpus.talks:
            yield render(tokenizer, talk.messages).ids


def check(before: Tokenizer, after: Tokenizer, keep: list[int], corpus: Corpus) -> None:
    """Raise GateError where the pruned tokenizer encodes the text differently."""
    pairs = zip(encoded(before, corpus), encoded(after, corpus), strict=True)
    for number, (old, new) in enumerate(pairs):
        if [keep[id] for id in new] != old:
            raise GateError(
                f"passage {number} of the text ({before.decode(old)[:60]!r})",
                rule="would be encoded into other tokens by the pruned tokenizer",
                next="please report this, with the name of the model",
            )
