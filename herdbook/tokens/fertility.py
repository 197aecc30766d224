"""How many tokens a text costs: per character and per word, script by script.

A tokenizer that knows a language spends 1.2 to 1.5 tokens on a word of it; LLaMA's spends about two
on one Chinese character, so a context of 2,048 tokens holds a thousand of them. Measured on the
user's own text, for two tokenizers side by side.

Text is taken apart into runs of one script; digits, blanks and punctuation belong to the run they
follow. A token counts where it starts. Chinese, Japanese, Thai and others do not part words by
blanks, so they have no tokens per word here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from herdbook.errors import DataError
from herdbook.tokens.tokenizer import Tokenizer

#: the first word of a character's Unicode name → its script
SCRIPTS = {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana",
} | {
    name.upper(): name
    for name in (
        *("Latin", "Greek", "Cyrillic", "Armenian", "Hebrew", "Arabic", "Devanagari", "Bengali"),
        *("Gurmukhi", "Gujarati", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai"),
        *("Lao", "Tibetan", "Myanmar", "Georgian", "Hangul", "Ethiopic", "Khmer", "Mongolian"),
    )
}
WITHOUT_BLANKS = frozenset(["Han", "Kana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"])
OTHER = "other"  # a text of digits and punctuation alone, and rare scripts


@dataclass
class Count:
    characters: int = 0
    words: int = 0
    tokens: int = 0
    tokens_in_words: int = 0  # of scripts that part their words

    def to_mapping(self) -> dict[str, Any]:
        return {
            "characters": self.characters,
            "words": self.words,
            "tokens": self.tokens,
            "tokens_per_character": self.tokens / self.characters,
            "tokens_per_word": self.tokens_in_words / self.words if self.words else None,
        }


def fertility(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Script → characters, words, tokens and their ratios; "all" first, then the largest."""
    counts: dict[str, Count] = {}
    for text in texts:
        runs = script_runs(text)
        _, spans = tokenizer.codec.encode_spans(text, first=True)
        place = 0
        for script, start, end in runs:
            count = counts.setdefault(script, Count())
            count.characters += end - start
            tokens = 0
            while place < len(spans) and (spans[place][0] < end or end == len(text)):
                place, tokens = place + 1, tokens + 1
            count.tokens += tokens
            if script not in WITHOUT_BLANKS:
                count.words += len(text[start:end].split())
                count.tokens_in_words += tokens
    if not counts:
        raise DataError("a text without characters", rule="has nothing to count")
    whole = Count()
    for count in counts.values():
        whole.characters += count.characters
        whole.words += count.words
        whole.tokens += count.tokens
        whole.tokens_in_words += count.tokens_in_words
    largest = sorted(counts, key=lambda script: (-counts[script].characters, script))
    return {"all": whole.to_mapping()} | {name: counts[name].to_mapping() for name in largest}


def script_runs(text: str) -> list[tuple[str, int, int]]:
    """(script, start, end) of runs that together are the whole text."""
    marks = [(place, script_of(one)) for place, one in enumerate(text)]
    known = [(place, script) for place, script in marks if script]
    if not known:
        return [(OTHER, 0, len(text))] if text else []
    runs: list[tuple[str, int, int]] = []
    for place, script in known:
        if not runs:
            runs.append((script, 0, len(text)))
        elif runs[-1][0] != script:
            runs[-1] = (runs[-1][0], runs[-1][1], place)
            runs.append((script, place, len(text)))
    return runs


@lru_cache(maxsize=65_536)
def script_of(character: str) -> str:
    """The script of a letter; "" for digits, blanks, marks and punctuation, which any may use."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    words = unicodedata.name(character, "").split()
    if words[:1] in (["FULLWIDTH"], ["HALFWIDTH"]):
        words = words[1:]
    return SCRIPTS.get(words[0], OTHER) if words else OTHER
