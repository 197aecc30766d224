r"""Byte-level BPE: the alphabet, and the regular expressions that cut text before merging.

GPT-2's trick: every byte has a printable character of its own (printable ASCII and Latin-1 stand for
themselves, the other 68 for U+0100 onwards), so a vocabulary of strings covers any text. A space is
"Ġ", a newline "Ċ": " Hello\n" is spelled "ĠHelloĊ".

Before merging, text is cut so that no token spans two pieces. GGUF names the way of cutting in
`tokenizer.ggml.pre`; each name stands for a list of expressions, applied one after another: what an
expression matches becomes a piece of its own, and so does what lies between two matches.

    "Born in 2024!"  smollm: \p{N} cuts the digits, then GPT-2's words: |Born| in| |2|0|2|4|!|

Source of the expressions: the models' own tokenizer.json files; names as llama.cpp gives them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from herdbook.errors import FileError, nearest

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2
_DIGIT = r"\p{N}"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Cut:
    """How one family of tokenizers cuts text."""

    expressions: tuple[str, ...]
    nfc: bool = False  # text is brought into Unicode's composed form first
    whole_words: bool = False  # a piece that is a token is not merged up from bytes (ignore_merges)
    add_bos: bool = False  # what llama.cpp assumes where the file does not say
    alias: tuple[str, ...] = ()  # how the original tokenizer.json says the same


#: `tokenizer.ggml.pre` → how to cut. Of several names for one way, the first is written.
CUTS: dict[str, Cut] = {
    "gpt-2": Cut((_WORDS,)),
    "mpt": Cut((_WORDS,)),
    "olmo": Cut((_WORDS,)),
    "phi-2": Cut((_WORDS,)),
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    "llama-bpe": Cut((_LLAMA3,), whole_words=True, add_bos=True),
    "llama3": Cut((_LLAMA3,), whole_words=True, add_bos=True),
    "llama-v3": Cut((_LLAMA3,), whole_words=True, add_bos=True),
    "dbrx": Cut((_LLAMA3,)),
    "smaug-bpe": Cut((_LLAMA3,)),
    "chatglm-bpe": Cut((_LLAMA3,)),
    "qwen2": Cut((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": Cut((_QWEN2,)),
    "stablelm2": Cut((_QWEN2,)),
    "smollm": Cut((_DIGIT, _WORDS)),
    "starcoder": Cut((_DIGIT, _WORDS)),
    "refact": Cut((_DIGIT, _WORDS)),
    "codeshell": Cut((_DIGIT, _WORDS)),
    "command-r": Cut((_DIGIT, _WORDS), nfc=True),
    "falcon": Cut(
        (_PUNCTUATION, _WORDS, "[0-9][0-9][0-9]"),
        alias=(_PUNCTUATION, _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
    "deepseek-coder": Cut(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT),
    ),
    "deepseek-v3": Cut((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "tekken": Cut((_CASED % ("", "") + rf"|{_DIGIT}" + _CASED_TAIL,), whole_words=True),
    "gpt-4o": Cut((_CASED % (_ENDINGS + "?", _ENDINGS + "?") + r"|\p{N}{1,3}" + _CASED_TAIL,)),
}


def _alphabet() -> dict[int, str]:
    """byte → its printable character."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + place) for place, byte in enumerate(rest)
    }


ALPHABET = _alphabet()
BYTES = {character: byte for byte, character in ALPHABET.items()}


def spelled(token: str) -> bytes:
    """The bytes that a token of the vocabulary stands for: "ĠHi" → b" Hi"."""
    try:
        return bytes(BYTES[character] for character in token)
    except KeyError:  # not spelled in the alphabet: an added token, its text as it is
        return token.encode()


def known_cut(pre: str) -> Cut:
    if pre not in CUTS:
        raise FileError(
            f"tokenizer.ggml.pre = {pre!r}",
            rule="is no way of cutting text that Herdbook knows",
            next=nearest(pre, list(CUTS)) + "; or take tokenizer.json from the model's own folder",
        )
    return CUTS[pre]


def build(
    tokens: Sequence[str], merges: Sequence[str], added: Sequence[AddedToken], cut: Cut
) -> Tokenizer:
    """A `tokenizers` tokenizer: tokens by id, merges as "Ġ t", the best first."""
    vocabulary = {token: id for id, token in enumerate(tokens)}
    pairs = [merge.partition(" ")[::2] for merge in merges]
    try:
        model = BPE(vocab=vocabulary, merges=pairs, ignore_merges=cut.whole_words)
    except Exception as error:  # the library raises bare Exception: a merge of unknown tokens
        raise FileError(
            f"the merges of this file ({error})",
            rule="do not fit its tokens",
            next="get the file again; it may be damaged",
        ) from error
    tokenizer = Tokenizer(model)
    prepare(tokenizer, cut)
    tokenizer.add_tokens(list(added))
    return tokenizer


def prepare(tokenizer: Tokenizer, cut: Cut) -> None:
    """Give a byte-level tokenizer its way of cutting and its alphabet."""
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(expression), "isolated") for expression in cut.expressions
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()


def detect(tokenizer: Tokenizer) -> str:
    """The `tokenizer.ggml.pre` of a byte-level tokenizer.json, known by its expressions."""
    found = _expressions(json.loads(tokenizer.pre_tokenizer.__getstate__()))
    composed = tokenizer.normalizer is not None and "NFC" in str(tokenizer.normalizer)
    names = [name for name, cut in CUTS.items() if found in map(list, (cut.expressions, cut.alias))]
    names.sort(key=lambda name: CUTS[name].nfc != composed)  # stable: the right one first
    if not names:
        raise FileError(
            f"this tokenizer.json cuts text by {found}",
            rule="and GGUF has no name for it that Herdbook knows",
            next="export to a Hugging Face folder instead: --to hf",
        )
    return names[0]


def _expressions(step: dict[str, Any]) -> list[str]:
    """A pre-tokenizer's JSON as the list of expressions that it applies."""
    kind = step["type"]
    if kind == "Sequence":
        return [one for inner in step["pretokenizers"] for one in _expressions(inner)]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return list(step["pattern"].values())
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [_WORDS] if step["use_regex"] else []
    if kind == "Digits":
        return [_DIGIT if step["individual_digits"] else r"\p{N}+"]
    if kind == "Punctuation" and step["behavior"] == "Contiguous":
        return [_PUNCTUATION]
    return [json.dumps(step)]
