"""Mixing: shares add up, nothing comes again before all came once, and (seed, epoch) decides."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.training.mixing import epoch, shares


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 9)), min_size=1, max_size=4))
def test_shares_add_up_and_follow_the_weights(parts: list[tuple[int, float]]) -> None:
    sizes, mix = [size for size, _ in parts], [weight for _, weight in parts]
    counts = shares(sizes, mix)
    assert sum(counts) == sum(sizes)
    for count, weight in zip(counts, mix, strict=True):
        assert abs(count - sum(sizes) * weight / sum(mix)) < 1


def test_no_row_comes_again_before_all_others_came() -> None:
    sizes, counts = (10, 3), (6, 7)
    seen: Counter[int] = Counter()
    for number in range(5):
        rows = epoch(sizes, counts, seed=1, number=number)
        assert sum(row < 10 for row in rows) == 6 and len(rows) == 13
        seen.update(rows)
        for first, size in ((0, 10), (10, 3)):
            times = [seen[row] for row in range(first, first + size)]
            assert max(times) - min(times) <= 1
    assert epoch(sizes, counts, 1, 3) == epoch(sizes, counts, 1, 3)
    assert epoch(sizes, counts, 1, 3) != epoch(sizes, counts, 2, 3)
    assert epoch(sizes, counts, 1, 3) != epoch(sizes, counts, 1, 4)
