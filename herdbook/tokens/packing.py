"""Packing: documents of many lengths into rows of one capacity, without padding and without cutting.

A row (`Pack`) is documents one after another; attention keeps them apart by `lengths`, so a document
is computed exactly as if it stood alone. Best fit decreasing: the longest document first, each into
the row where it leaves the least room. On chat data this fills more than 99 % of the capacity.

    lengths 5 3 3 2, capacity 8  →  [5 3] [3 2]
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from herdbook.tokens.chat import Rendering


@dataclass(frozen=True)
class Pack:
    ids: list[int]  # [T] the documents' tokens, one document after another
    mask: list[bool]  # [T] where the loss is
    lengths: list[int]  # tokens of each document; their sum is T


def pack(renderings: Sequence[Rendering], capacity: int) -> tuple[list[Pack], list[int]]:
    """(rows of at most `capacity` tokens, indices of the renderings that were left out).

    Left out are those longer than `capacity` (nothing is ever cut: half an answer without its end
    teaches the model to stop nowhere) and those without a token. The caller counts and reports them.
    The same renderings give the same rows in the same order. Rows stand in the order in which they
    were opened, the fullest of long documents first: shuffle them for training.
    """
    assert capacity > 0
    sizes = [len(rendering.ids) for rendering in renderings]
    left_out = [index for index, size in enumerate(sizes) if not 0 < size <= capacity]
    fitting = [index for index, size in enumerate(sizes) if 0 < size <= capacity]
    fitting.sort(key=lambda index: (-sizes[index], index))

    rows: list[list[int]] = []  # indices of documents
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted, rows that are full left out
    for index in fitting:
        size = sizes[index]
        place = bisect.bisect_left(room, (size, -1))  # the least free space that is enough
        if place < len(room):
            free, row = room.pop(place)
            rows[row].append(index)
        else:
            free, row = capacity, len(rows)
            rows.append([index])
        if free > size:
            bisect.insort(room, (free - size, row))

    packs = []
    for documents in rows:
        chosen = [renderings[index] for index in documents]
        packs.append(
            Pack(
                ids=list(chain.from_iterable(one.ids for one in chosen)),
                mask=list(chain.from_iterable(one.mask for one in chosen)),
                lengths=[len(one.ids) for one in chosen],
            )
        )
    return packs, left_out
