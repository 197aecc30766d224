"""Extraction: fields read out of a text, as JSON, against the fields that are in it.

A reply holds one JSON object, {field: value or list of values}, or one list of values; a fence
(```json) and words around it are allowed. Values compare as text without case and outer spaces;
numbers by value. What cannot be read is unparsed: counted, shown, and all that it should have found
counts as missed (a model does not gain by breaking its format).
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from herdbook.evaluation.marks.overlap import Overlap

#: unparsed replies kept to be looked at
EXAMPLES = 5
#: places at which a reply may begin its JSON that are tried
_TRIES = 100

Fields = dict[str, Counter[str]]


@dataclass(frozen=True)
class Extracted:
    """`micro` counts every value once; `macro` is the mean F1 of the fields."""

    micro: Overlap
    macro: float
    fields: Mapping[str, Overlap]
    unparsed: int
    examples: Sequence[str]


def read_fields(reply: str) -> Fields | None:
    """Field → its values. A list without names is the field "". None: unparsed.

    >>> read_fields('Here: {"drug": ["Aspirin ", "aspirin"], "dose": 5.0}')
    {'drug': Counter({'aspirin': 2}), 'dose': Counter({'5': 1})}
    """
    for value in _values(reply):
        if isinstance(value, list):
            value = {"": value}
        if isinstance(value, dict):
            fields = {str(name): _items(one) for name, one in value.items()}
            if all(items is not None for items in fields.values()):
                return {name: items for name, items in fields.items() if items is not None}
        return None
    return None


def extraction_f1(reply: str, reference: Any) -> float | None:
    """One reply: F1 over all its values; 1 where nothing was to be found and nothing was."""
    if read_fields(reply) is None:
        return None
    common, said, wanted = counts(reply, reference)
    return Overlap.of(common, said, wanted).f1 if said or wanted else 1.0


def counts(reply: str, reference: Any) -> tuple[int, int, int]:
    """One reply's values: in common, said, wanted. One that cannot be read says nothing."""
    found = _counts(read_fields(reply) or {}, _reference(reference)).values()
    common, said, wanted = map(sum, zip(*found, strict=True))
    return common, said, wanted


def score_extraction(replies: Sequence[str], references: Sequence[Any]) -> Extracted:
    """Micro and macro precision, recall and F1 over a set of replies."""
    totals: dict[str, list[int]] = {}
    broken = []
    for reply, reference in zip(replies, references, strict=True):
        mine, theirs = read_fields(reply), _reference(reference)
        if mine is None:
            broken.append(reply)
        for name, counts in _counts(mine or {}, theirs).items():
            known = totals.setdefault(name, [0, 0, 0])
            totals[name] = [a + b for a, b in zip(known, counts, strict=True)]
    fields = {name: Overlap.of(*counts) for name, counts in totals.items() if any(counts)}
    sums = [sum(one[i] for one in totals.values()) for i in range(3)]
    macro = sum(one.f1 for one in fields.values()) / max(len(fields), 1)
    return Extracted(Overlap.of(*sums), macro, fields, len(broken), broken[:EXAMPLES])


def _counts(mine: Fields, theirs: Fields) -> dict[str, tuple[int, int, int]]:
    """Field → values in common, said, wanted."""
    empty: Counter[str] = Counter()
    found = {"": (0, 0, 0)}
    for name in {**theirs, **mine}:
        left, right = mine.get(name, empty), theirs.get(name, empty)
        found[name] = ((left & right).total(), left.total(), right.total())
    return found


def _reference(value: Any) -> Fields:
    fields = read_fields(value if isinstance(value, str) else json.dumps(value))
    assert fields is not None, f"a reference that is no object or list of values: {value!r}"
    return fields


def _values(reply: str) -> Iterator[Any]:
    """The first JSON object or list in a text."""
    decoder, tries = json.JSONDecoder(), 0
    for place, letter in enumerate(reply):
        if letter in "{[":
            tries += 1
            try:
                yield decoder.raw_decode(reply, place)[0]
                return
            except (ValueError, RecursionError):
                if tries == _TRIES:
                    return


def _items(value: Any) -> Counter[str] | None:
    """A value, or a list of them, as texts; None where it is nested deeper."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(one, dict | list) for one in values):
        return None
    return Counter(_plain(one) for one in values if one is not None)


def _plain(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return unicodedata.normalize("NFKC", text).strip().casefold()
