"""Train a tokenizer on the user's own text.

    bpe       SentencePiece, pieces with "▁", as LLaMA's: unknown characters fall back to bytes
    unigram   SentencePiece, the likeliest pieces, as T5's; also falls back to bytes
    bytes     byte-level BPE, as Qwen's and SmolLM2's

A vocabulary of its own pays where another's is poor: LLaMA's spends two tokens on most Chinese
characters. Compare with `herd tokenizer fertility`. The same text and settings give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import sentencepiece
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from herdbook.book.step import Bench
from herdbook.errors import ConfigError, DataError
from herdbook.files.atomic import write_bytes, write_text
from herdbook.tokens import bytebpe
from herdbook.tokens.bytebpe import Cut
from herdbook.tokens.corpus import Corpus, TextStep
from herdbook.tokens.tokenizer import Tokenizer

Algorithm = Literal["bpe", "unigram", "bytes"]
#: special tokens of byte-level BPE; the first also stands for "nothing"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: 256 bytes and the special tokens: no tokenizer has fewer
SMALLEST = 256 + len(SPECIALS)
#: Qwen's way of cutting, but text stays as it is (no NFC), so that decoding gives it back
CUT = Cut(bytebpe.CUTS["qwen2"].expressions)


@dataclass(frozen=True)
class TrainTokenizer(TextStep):
    """Train a tokenizer on your text: SentencePiece (bpe, unigram) or byte-level BPE (bytes)."""

    kind: ClassVar[str] = "tokenizer"

    algorithm: Algorithm = "bpe"
    size: int = 8_000  # tokens, with the 256 bytes and the special ones

    def check(self) -> None:
        super().check()
        if self.size <= SMALLEST:
            raise ConfigError(
                f"size = {self.size}",
                rule=f"leaves no room beside {SMALLEST} bytes and special tokens",
                next="try 8000",
            )

    def make(self, bench: Bench) -> dict[str, Any]:
        corpus = self.corpus(bench)
        bench.progress.say(f"  training {self.size:,} tokens ({self.algorithm})")
        tokenizer = train(corpus, self.algorithm, self.size, bench.work)
        tokenizer.save(bench.out)
        lines = list(corpus.lines())
        tokens = sum(len(tokenizer.encode(line)) for line in lines)
        characters = sum(map(len, lines))
        return {
            "vocabulary": tokenizer.size,
            "characters": characters,
            "tokens": tokens,
            "tokens_per_character": tokens / characters,
        }


def train(corpus: Corpus, algorithm: Algorithm, size: int, work: Path) -> Tokenizer:
    """A tokenizer of `size` tokens. work: a folder to pass files through."""
    if algorithm == "bytes":
        path = work / "tokenizer.json"
        write_text(path, _bytes(corpus, size).to_str())
        settings = '{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}'
        write_text(work / "tokenizer_config.json", settings)
    else:
        path = work / "tokenizer.model"
        write_bytes(path, _pieces(corpus, algorithm, size))
    return Tokenizer.load(path)


def _pieces(corpus: Corpus, algorithm: str, size: int) -> bytes:
    """A serialised SentencePiece model, made with LLaMA's settings."""
    longest = max(len(line.encode()) for line in corpus.lines())
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus.lines()),
            model_writer=out,
            model_type=algorithm,
            vocab_size=size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=longest + 1,  # longer lines would be left out
            num_threads=1,  # how sums are split over threads would show in the scores
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"value <= (\d+)", str(error)):
            raise _too_large(size, int(found[1])) from error
        if found := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise ConfigError(
                f"size = {size}",
                rule=f"is too small: the text's characters and the bytes alone are {found[1]}",
                next=f"set size to more than {found[1]}",
            ) from error
        raise DataError(
            f"SentencePiece cannot train on this text ({str(error).strip()})",
            rule="it needs lines of ordinary text",
            next="look at the file; try algorithm = bytes",
        ) from error
    return out.getvalue()


def _bytes(corpus: Corpus, size: int) -> Library:
    library = Library(models.BPE())
    bytebpe.prepare(library, CUT)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(one, normalized=False, special=True) for one in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        yield from corpus

    library.train_from_iterator(texts(), trainer)
    found = library.get_vocab_size()
    if found < size:
        raise _too_large(size, found)
    return library


def _too_large(size: int, possible: int) -> ConfigError:
    return ConfigError(
        f"size = {size}",
        rule=f"is too large for this text, which gives at most {possible} tokens",
        next=f"set size to {possible} or less, or give more text",
    )
