"""Does a reply follow instructions that a program can check? In the spirit of IFEval (Zhou 2023).

A row is {"prompt": …, "constraints": [{"kind": "words", "at_least": 50}, …]}. `read` refuses kinds and
parameters that there are not; `follows` checks one reply. Words and sentences are those of
`words.py`, so that «at most 100 words» means characters in Chinese.

**Strict**: the reply as it is. **Loose**: as IFEval has it, the reply or one of its versions without
its first line, its last line, both, or its asterisks, for a model that says «Sure, here it is:» first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from herdbook.errors import DataError, nearest
from herdbook.evaluation.code.running import fenced
from herdbook.evaluation.marks import words

_PARAGRAPH = re.compile(r"\n\s*\n")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.、)])\s*\S", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]|【[^【】\n]+】")
_TITLE = re.compile(r"<<[^<>\n]+>>|《[^《》\n]+》|^#{1,6} +\S|^\*\*[^*\n]+\*\*$", re.MULTILINE)
_POSTSCRIPT = re.compile(
    r"^\s*(?:P\.\s?(?:P\.\s?)?S\b|附[：:言注]|又及)", re.MULTILINE | re.IGNORECASE
)

Check = Callable[[str], bool]


@dataclass(frozen=True)
class Constraint:
    """One instruction, ready to check."""

    kind: str
    check: Check


@dataclass(frozen=True)
class Followed:
    """One reply: for each constraint, was it followed as it stands, and loosely?"""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


# ----------------------------------------------------------------------------------------- checks


def _counted(count: Callable[[str], int]) -> Callable[[Mapping[str, Any]], Check]:
    """A number that has bounds: at_least, at_most, exactly."""

    def make(given: Mapping[str, Any]) -> Check:
        if not given:
            raise ValueError("needs at_least, at_most or exactly")
        low, high = given.get("at_least", 0), given.get("at_most", float("inf"))
        if "exactly" in given:
            if len(given) > 1:
                raise ValueError("takes exactly alone, without at_least and at_most")
            low = high = given["exactly"]
        if low > high:
            raise ValueError(f"wants at least {low} and at most {high}")
        return lambda reply: low <= count(reply) <= high

    return make


def _occurs(reply: str, word: str) -> int:
    """How often a word stands in a reply, without case; inside another word it does not count,
    unless it is Chinese, which has no gaps."""
    before = r"(?<![A-Za-z0-9_])" if word[0].isascii() else ""
    after = r"(?![A-Za-z0-9_])" if word[-1].isascii() else ""
    return len(re.findall(before + re.escape(word) + after, reply, re.IGNORECASE))


def _keywords(given: Mapping[str, Any]) -> Check:
    _needs(given, "words")
    return lambda reply: all(_occurs(reply, word) for word in given["words"])


def _no_keywords(given: Mapping[str, Any]) -> Check:
    _needs(given, "words")
    return lambda reply: not any(_occurs(reply, word) for word in given["words"])


def _frequency(given: Mapping[str, Any]) -> Check:
    _needs(given, "word")
    bounds = {name: value for name, value in given.items() if name != "word"}
    return _counted(lambda reply: _occurs(reply, given["word"]))(bounds)


def _language(given: Mapping[str, Any]) -> Check:
    _needs(given, "is")
    if given["is"] not in ("zh", "en"):
        raise ValueError(f"is {given['is']!r}, but knows zh and en")
    return lambda reply: words.language(reply) == given["is"]


def _json(reply: str) -> bool:
    text = fenced(reply)
    try:
        json.loads(reply if text is None or _outside(reply) else text)
    except (ValueError, RecursionError):
        return False
    return True


def _outside(reply: str) -> bool:
    """Does text stand before or after the fence?"""
    return not re.fullmatch(r"\s*```.*```\s*", reply, re.DOTALL)


def _cased(wanted: str) -> Check:
    """All letters that have a case have this one, and there are some."""

    def check(reply: str) -> bool:
        letters = [letter for letter in reply if letter.lower() != letter.upper()]
        return bool(letters) and all(getattr(letter, wanted)() for letter in letters)

    return check


def _starts(given: Mapping[str, Any]) -> Check:
    _needs(given, "with")
    return lambda reply: reply.strip().startswith(given["with"])


def _ends(given: Mapping[str, Any]) -> Check:
    _needs(given, "with")
    return lambda reply: reply.strip().endswith(given["with"])


def _needs(given: Mapping[str, Any], name: str) -> None:
    if not given.get(name):
        raise ValueError(f"needs {name}")


def _plain(check: Check) -> Callable[[Mapping[str, Any]], Check]:
    return lambda given: check


BOUNDS: dict[str, type] = {"at_least": int, "at_most": int, "exactly": int}
#: kind → what makes its check, and its parameters
KINDS: dict[str, tuple[Callable[[Mapping[str, Any]], Check], dict[str, type]]] = {
    "words": (_counted(lambda reply: len(words.words(reply))), BOUNDS),
    "characters": (_counted(lambda reply: len(re.sub(r"\s", "", reply))), BOUNDS),
    "sentences": (_counted(lambda reply: len(words.sentences(reply))), BOUNDS),
    "paragraphs": (
        _counted(lambda reply: sum(bool(p.strip()) for p in _PARAGRAPH.split(reply))),
        BOUNDS,
    ),
    "bullets": (_counted(lambda reply: len(_BULLET.findall(reply))), BOUNDS),
    "placeholders": (_counted(lambda reply: len(_PLACEHOLDER.findall(reply))), BOUNDS),
    "keywords": (_keywords, {"words": list}),
    "no keywords": (_no_keywords, {"words": list}),
    "frequency": (_frequency, {"word": str} | BOUNDS),
    "language": (_language, {"is": str}),
    "json": (_plain(_json), {}),
    "no comma": (_plain(lambda reply: not re.search(r"[,，、]", reply)), {}),
    "upper case": (_plain(_cased("isupper")), {}),
    "lower case": (_plain(_cased("islower")), {}),
    "starts": (_starts, {"with": str}),
    "ends": (_ends, {"with": str}),
    "title": (_plain(lambda reply: bool(_TITLE.search(reply))), {}),
    "postscript": (_plain(lambda reply: bool(_POSTSCRIPT.search(reply))), {}),
}


# ---------------------------------------------------------------------------------- rows and scores


def read(row: Mapping[str, Any]) -> list[Constraint]:
    """The constraints of a row. Errors: DataError names the kind or parameter that cannot be."""
    given = row.get("constraints")
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise DataError(
            f"constraints {given!r}"[:200],
            rule="are not a list of {kind, …}",
            next='write [{"kind": "words", "at_most": 100}]',
        )
    return [_constraint(one) for one in given]


def _constraint(one: Mapping[str, Any]) -> Constraint:
    kind = str(one.get("kind"))
    if kind not in KINDS:
        raise DataError(
            f"constraint {kind!r}", rule="is not known", next=nearest(kind, list(KINDS))
        )
    make, parameters = KINDS[kind]
    given = {name: value for name, value in one.items() if name != "kind"}
    for name, value in given.items():
        wanted = parameters.get(name)
        if wanted is None:
            raise DataError(
                f"{name!r} of constraint {kind!r}",
                rule="is no parameter of it",
                next=nearest(name, list(parameters)),
            )
        fits = type(value) is wanted and not (isinstance(value, int) and value < 0)
        if wanted is list:
            fits = fits and all(isinstance(word, str) and word for word in value)
        if not fits:
            raise DataError(
                f"{name} {value!r} of constraint {kind!r}",
                rule=f"must be {_TYPES[wanted]}",
                next="mend the row",
            )
    try:
        return Constraint(kind, make(given))
    except ValueError as error:
        raise DataError(f"constraint {kind!r}", rule=str(error), next="mend the row") from None


_TYPES = {int: "a whole number from 0", str: "a text", list: "a list of words"}


def follows(constraints: Sequence[Constraint], reply: str) -> Followed:
    """Check one reply; nothing at all follows no instruction."""
    if not reply.strip():
        nothing = (False,) * len(constraints)
        return Followed(nothing, nothing)
    versions = _versions(reply)
    return Followed(
        tuple(one.check(reply) for one in constraints),
        tuple(any(map(one.check, versions)) for one in constraints),
    )


def _versions(reply: str) -> list[str]:
    lines = reply.split("\n")
    parts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    texts = [reply, *("\n".join(part).strip() for part in parts)]
    return [text for one in texts for text in (one, one.replace("*", "")) if text.strip()]
