"""IFEval's own rows (Zhou 2023): {"instruction_id_list": ["…"], "kwargs": [{…}]} as constraints.

Each id has the rule of the published checker, so that figures compare. Three of them lean on language
models there, and on something simpler here: sentences and capital words are cut by `words.py`, not by
NLTK; a response's language is told by its script, and among Latin ones English from others by its
commonest words, not by langdetect.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from herdbook.errors import DataError, nearest
from herdbook.evaluation.marks.constraints import Check, Constraint
from herdbook.evaluation.marks.words import sentences, words

#: language code → the script's name as Unicode's character names begin
_SCRIPTS: dict[str, str | tuple[str, ...]] = {
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ar": "ARABIC", "fa": "ARABIC", "ur": "ARABIC", "hi": "DEVANAGARI", "mr": "DEVANAGARI",
    "ne": "DEVANAGARI", "ru": "CYRILLIC", "bg": "CYRILLIC", "uk": "CYRILLIC", "bn": "BENGALI",
    "ta": "TAMIL", "te": "TELUGU", "kn": "KANNADA", "gu": "GUJARATI", "pa": "GURMUKHI", "th": "THAI",
    "ko": "HANGUL", "zh": "CJK", "el": "GREEK", "he": "HEBREW", "ml": "MALAYALAM",
}  # fmt: skip
_LATIN = (
    "en",
    "es",
    "pt",
    "it",
    "fr",
    "de",
    "nl",
    "vi",
    "sw",
    "fi",
    "pl",
    "tr",
    "sv",
    "id",
    "cs",
    "ro",
)
_ENGLISH = frozenset(
    ("the", "of", "and", "to", "a", "in", "is", "it", "you", "that", "for", "with", "this", "i")
)
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_CHEVRONS = re.compile(r"<<[^\n]+>>")


def read(row: Mapping[str, Any]) -> list[Constraint]:
    """The constraints of a row. Errors: DataError names the id or argument that cannot be."""
    ids, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(ids, list) or not isinstance(arguments, list) or len(ids) != len(arguments):
        raise DataError(
            f"a row with {', '.join(sorted(row)) or 'nothing'}",
            rule="needs instruction_id_list and as many kwargs",
            next="give IFEval's input_data.jsonl, or rows of {prompt, constraints}",
        )
    found = []
    for name, given in zip(ids, arguments, strict=True):
        if name not in RULES:
            raise DataError(
                f"instruction {name!r}", rule="is not known", next=nearest(str(name), [*RULES])
            )
        given = {key: value for key, value in (given or {}).items() if value is not None}
        if name == "combination:repeat_prompt" and "prompt_to_repeat" not in given:
            given["prompt_to_repeat"] = row.get("prompt")
        try:
            found.append(Constraint(name, RULES[name](**given)))
        except (TypeError, AttributeError, ValueError, re.error) as error:
            raise DataError(
                f"instruction {name} with {given}", rule=str(error), next="mend the row"
            ) from None
    return found


def _relation(count: Callable[[str], int], limit: int, relation: str) -> Check:
    if relation not in ("at least", "less than") or not isinstance(limit, int):
        raise ValueError(f"{relation!r} {limit!r} is no bound")
    if relation == "less than":
        return lambda reply: count(reply) < limit
    return lambda reply: count(reply) >= limit


def _exist(keywords: list[str]) -> Check:
    patterns = [re.compile(word, re.IGNORECASE) for word in keywords]
    return lambda reply: all(pattern.search(reply) for pattern in patterns)


def _forbidden(forbidden_words: list[str]) -> Check:
    patterns = [re.compile(rf"\b{word}\b", re.IGNORECASE) for word in forbidden_words]
    return lambda reply: not any(pattern.search(reply) for pattern in patterns)


def _frequency(keyword: str, frequency: int, relation: str) -> Check:
    pattern = re.compile(keyword, re.IGNORECASE)
    return _relation(lambda reply: len(pattern.findall(reply)), frequency, relation)


def _letters(letter: str, let_frequency: int, let_relation: str) -> Check:
    small = letter.lower()
    return _relation(lambda reply: Counter(reply.lower())[small], let_frequency, let_relation)


def _language(language: str) -> Check:
    if language not in _SCRIPTS and language not in _LATIN:
        raise ValueError(f"the language {language!r} is not one whose script is known")
    return lambda reply: _speaks(reply, language)


def _speaks(reply: str, language: str) -> bool:
    """Most of its letters are of the language's script; Latin ones are English by their words."""
    letters = [one for one in reply if one.isalpha()]
    wanted = _SCRIPTS.get(language, "LATIN")
    if language == "ja" and not any(unicodedata.name(c, "").startswith("HIRA") for c in letters):
        return False  # Chinese characters alone are Chinese
    own = sum(unicodedata.name(one, "").startswith(wanted) for one in letters)
    if not letters or own <= len(letters) / 2:
        return False
    return wanted != "LATIN" or (language == "en") == _english(reply)


def _english(reply: str) -> bool:
    tokens = [word.lower() for word in words(reply)]
    return sum(token in _ENGLISH for token in tokens) >= 0.08 * len(tokens)


def _paragraphs(num_paragraphs: int) -> Check:
    def check(reply: str) -> bool:
        parts = re.split(r"\s?\*\*\*\s?", reply)
        if any(not part.strip() for part in parts[1:-1]):
            return False
        return sum(bool(part.strip()) for part in parts) == num_paragraphs

    return check


def _first_word(num_paragraphs: int, nth_paragraph: int, first_word: str) -> Check:
    wanted = first_word.lower()

    def check(reply: str) -> bool:
        parts = reply.split("\n\n")
        if nth_paragraph > sum(bool(part.strip()) for part in parts):
            return False
        paragraph = parts[nth_paragraph - 1].strip()
        if not paragraph:
            return False
        word = paragraph.split()[0].strip().lstrip("'").lstrip('"')
        word = re.split(r"[.,?!'\"]", word)[0].lower()
        return sum(bool(part.strip()) for part in parts) == num_paragraphs and word == wanted

    return check


def _postscript(postscript_marker: str) -> Check:
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    marker = known.get(postscript_marker, r"\s*" + postscript_marker.lower() + r".*$")
    pattern = re.compile(marker, re.MULTILINE)
    return lambda reply: bool(pattern.search(reply.lower()))


def _bullets(num_bullets: int) -> Check:
    def count(reply: str) -> int:
        stars = re.findall(r"^\s*\*[^\*].*$", reply, re.MULTILINE)
        return len(stars) + len(re.findall(r"^\s*-.*$", reply, re.MULTILINE))

    return lambda reply: count(reply) == num_bullets


def _highlights(num_highlights: int) -> Check:
    def count(reply: str) -> int:
        single = re.findall(r"\*[^\n\*]*\*", reply)
        double = re.findall(r"\*\*[^\n\*]*\*\*", reply)
        plain = sum(bool(one.strip("*").strip()) for one in single)
        return plain + sum(bool(one[2:-2].strip()) for one in double)

    return lambda reply: count(reply) >= num_highlights


def _sections(section_spliter: str, num_sections: int) -> Check:
    pattern = re.compile(rf"\s?{section_spliter}\s?\d+\s?")
    return lambda reply: len(pattern.split(reply)) - 1 >= num_sections


def _json(reply: str) -> bool:
    text = reply.strip()
    for mark in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(mark)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(reply: str) -> bool:
    return any(one.lstrip("<").rstrip(">").strip() for one in _CHEVRONS.findall(reply))


def _two(reply: str) -> bool:
    parts = reply.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    whole = [part for part in parts if part.strip()]
    return len(whole) == 2 and whole[0].strip() != whole[1].strip()


def _repeated(prompt_to_repeat: str) -> Check:
    wanted = prompt_to_repeat.strip().lower()
    return lambda reply: reply.strip().lower().startswith(wanted)


def _ending(end_phrase: str) -> Check:
    wanted = end_phrase.strip().lower()
    return lambda reply: reply.strip().strip('"').lower().endswith(wanted)


def _quoted(reply: str) -> bool:
    text = reply.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _at_least(count: Callable[[str], int], limit: int) -> Check:
    return _relation(count, limit, "at least")


#: id → what makes its check out of the row's arguments
RULES: dict[str, Callable[..., Check]] = {
    "keywords:existence": _exist,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": lambda num_sentences, relation: _relation(
        lambda reply: len(sentences(reply)), num_sentences, relation
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda num_words, relation: _relation(
        lambda reply: len(re.findall(r"\w+", reply)), num_words, relation
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda num_placeholders: _at_least(
        lambda reply: len(re.findall(r"\[.*?\]", reply)), num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda: (
        lambda reply: any(option in reply for option in _OPTIONS)
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": lambda: _json,
    "detectable_format:title": lambda: _title,
    "combination:two_responses": lambda: _two,
    "combination:repeat_prompt": _repeated,
    "startend:end_checker": _ending,
    "startend:quotation": lambda: _quoted,
    "change_case:capital_word_frequency": lambda capital_frequency, capital_relation: _relation(
        lambda reply: sum(word.isupper() for word in words(reply)),
        capital_frequency,
        capital_relation,
    ),
    "change_case:english_capital": lambda: lambda reply: reply.isupper() and _speaks(reply, "en"),
    "change_case:english_lowercase": lambda: lambda reply: reply.islower() and _speaks(reply, "en"),
    "punctuation:no_comma": lambda: lambda reply: "," not in reply,
}
