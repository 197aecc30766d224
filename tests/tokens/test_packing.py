from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.tokens.chat import Rendering
from herdbook.tokens.packing import pack


def document(number: int, size: int) -> Rendering:
    """Ids that say which document and which place they are from."""
    ids = [number * 10_000 + place for place in range(size)]
    return Rendering(ids, [id % 3 == 0 for id in ids])


def test_best_fit_decreasing() -> None:
    packs, left_out = pack([document(i, size) for i, size in enumerate([2, 3, 5, 3])], 8)
    assert [one.lengths for one in packs] == [[5, 3], [3, 2]]
    assert packs[0].ids[:5] == document(2, 5).ids
    assert left_out == []


def test_too_long_and_empty_ones_are_left_out_and_told() -> None:
    packs, left_out = pack([document(i, size) for i, size in enumerate([9, 8, 0, 1])], 8)
    assert [one.lengths for one in packs] == [[8], [1]]
    assert left_out == [0, 2]
    assert pack([], 8) == ([], [])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 40))
def test_each_document_once_whole_and_in_order(sizes: list[int], capacity: int) -> None:
    documents = [document(i, size) for i, size in enumerate(sizes)]
    packs, left_out = pack(documents, capacity)
    seen: list[int] = []
    for one in packs:
        assert len(one.ids) == len(one.mask) == sum(one.lengths) <= capacity
        at = 0
        for size in one.lengths:
            number = one.ids[at] // 10_000
            assert one.ids[at : at + size] == documents[number].ids
            assert one.mask[at : at + size] == documents[number].mask
            seen.append(number)
            at += size
    assert sorted(seen + left_out) == list(range(len(sizes)))
    assert all(sizes[i] == 0 or sizes[i] > capacity for i in left_out)
    assert pack(documents, capacity) == (packs, left_out)
    # best fit leaves no two rows that would fit into one
    free = sorted(capacity - len(one.ids) for one in packs)
    assert len(free) < 2 or free[-1] + free[-2] < capacity


def test_chat_lengths_fill_the_rows_quickly() -> None:
    """10,000 conversations with log-normal lengths (median 150 tokens), as chat data has them."""
    draw = random.Random(0)
    sizes = [min(1024, max(8, int(draw.lognormvariate(5.0, 0.8)))) for _ in range(10_000)]
    ids, mask = list(range(1024)), [True] * 1024
    documents = [Rendering(ids[:size], mask[:size]) for size in sizes]
    start = time.process_time()
    packs, left_out = pack(documents, 1024)
    seconds = time.process_time() - start
    filled = sum(sizes) / (len(packs) * 1024)
    assert left_out == []
    assert filled > 0.995, filled
    assert seconds < 5, seconds  # about 0.2 on one core
