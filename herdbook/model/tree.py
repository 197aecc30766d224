"""CPM-Bee's input, a tree of texts, as one row of tokens, and back: which segment each token is of.

    {"input": "今天天气是真的", "<ans>": ""}

    <s> <root> </s>  <s> input </s>  <s> 今天天气是真的 </s>  <s> <ans> </s>  <s> 好 啊 </s>
    segment 0        1, its child    2, child of 1         3               4, an answer

Every key and every text is a segment, children behind their parents. A text below "<ans>" is an
*answer*; all else is context.

An id is token + number · vocabulary. Of a segment's first token the number is its depth in the tree,
1 for the keys of the outermost dictionary. Where no depth is given keys and texts take turns, as
above, so that tokens without numbers do for a flat dictionary. Of any other token the number tells
those of a kind apart: the k-th name that begins with "<mask_" is <mask> with the number k.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import RequestError
from herdbook.model.own_configs import Marks

#: steps up and down the tree are told apart below this
STEPS = 8
#: numbers are below this
NUMBERS = 1024


@dataclass
class Tree:
    """What is known of one document's tokens. paths: of each segment, root … itself."""

    segment: list[int] = field(default_factory=list)
    context: list[bool] = field(default_factory=list)
    paths: list[tuple[int, ...]] = field(default_factory=lambda: [(0,)])

    @property
    def answering(self) -> bool:
        """More tokens are an answer's."""
        return not self.context[-1]

    def more(self, count: int) -> None:
        """So many further tokens of the last segment."""
        self.segment += self.segment[-1:] * count
        self.context += self.context[-1:] * count

    def relations(self) -> Tensor:
        """How segments stand to each other: int64 [G, G], query then key. 0: the same; else
        1 + up · STEPS + down, the steps from the one up to what both lie under, and down to the other.
        """
        rows = []
        for a in self.paths:
            row = []
            for b in self.paths:
                common = sum(1 for x, y in zip(a, b, strict=False) if x == y)
                up, down = (min(len(one) - common, STEPS - 1) for one in (a, b))
                row.append(up * STEPS + down + 1 if up or down else 0)
            rows.append(row)
        return torch.tensor(rows)


def parse(ids: Sequence[int], marks: Marks) -> Tree:
    """The tree that a row of ids is. An answer ends with the row, or where a depth begins another
    segment: what a model writes never changes what was asked."""
    tree = Tree()
    heads: list[list[int]] = [[]]  # what follows each segment's first token
    inside = [False]  # which segments lie below <ans>
    for place, id in enumerate(ids):
        token, depth = id % marks.vocab, id // marks.vocab
        if place and token == marks.first and (depth or not inside[-1]):
            path = tree.paths[-1]
            depth = depth or (2 if len(path) == 2 else 1)
            if depth > len(path):
                raise RequestError(
                    f"a segment at depth {depth} behind one at depth {len(path) - 1}",
                    rule="has no parent",
                    next="write a key before what it names",
                )
            tree.paths.append((*path[:depth], len(heads)))
            below = depth > 1 and heads[tree.paths[-1][1]] == [marks.answer, marks.last]
            inside.append(below)
            heads.append([])
        elif place and len(heads[-1]) < 3:
            heads[-1].append(id)
        tree.segment.append(len(heads) - 1)
    parents = {path[-2] for path in tree.paths[1:]}
    answers = {number for number, below in enumerate(inside) if below} - parents
    tree.context = [number not in answers for number in tree.segment]
    return tree


def flatten(
    data: Mapping[str, Any], encode: Callable[[str], Sequence[int]], marks: Marks
) -> list[int]:
    """A dictionary of texts and dictionaries as a row that waits for its one empty answer.

    encode: text → ids, special tokens parsed.
    """
    if not isinstance(data, Mapping) or "<ans>" not in data:
        raise RequestError(
            f"a tree with the keys {sorted(map(str, data))}",
            rule="has no place for an answer",
            next='add "<ans>": ""',
        )
    numbers: dict[str, dict[str, int]] = {}

    def tokens(text: Any) -> list[int]:
        if not isinstance(text, str):
            raise RequestError(
                f"{text!r} in a tree",
                rule="is neither a text nor a dictionary",
                next="write it as a text",
            )
        found: list[int] = []
        for part in re.split(r"(<[A-Za-z]+_\w+>)", text):
            kind = f"<{part[1:].partition('_')[0]}>" if re.fullmatch(r"<.+_\w+>", part) else ""
            known = list(encode(kind)) if kind else []
            if len(known) != 1:
                found += encode(part)
                continue
            mine = numbers.setdefault(kind, {})
            found.append(
                known[0] + marks.vocab * min(mine.setdefault(part, len(mine)), NUMBERS - 1)
            )
        if {marks.first, marks.last} & set(found):
            raise RequestError(
                f"{text[:60]!r} in a tree",
                rule="holds the marks that divide it",
                next="take <s> and </s> out of the text",
            )
        return found

    row = [marks.first, marks.root, marks.last]
    open_answers = 0

    def write(value: Any, depth: int, below: bool) -> None:
        nonlocal open_answers
        begin = marks.first + depth * marks.vocab
        if not isinstance(value, Mapping):
            row.extend([begin, *tokens(value)])
            open_answers += below and not value
            if not below:
                row.append(marks.last)
            return
        for key, inner in value.items():
            row.extend([begin, *tokens(key), marks.last])
            write(inner, depth + 1, below or (depth == 1 and key == "<ans>"))

    write({key: value for key, value in data.items() if key != "<ans>"}, 1, False)
    write({"<ans>": data["<ans>"]}, 1, False)
    if open_answers != 1 or row[-1] % marks.vocab != marks.first:
        raise RequestError(
            f"a tree with {open_answers} empty answers",
            rule="must have one, and it must be the last",
            next="ask for one answer at a time, the earlier ones filled in",
        )
    return row
