"""Mixing: how many rows of each dataset an epoch takes, and which.

    sizes 100 and 10, mix 1 : 1  →  55 rows of each an epoch; the small one comes round 5½ times, and
                                    of the large one the next 45 come first in the next epoch

Each dataset is gone through again and again, each time in another order, and an epoch takes its share
from where the last one stopped: so no row comes a second time before all others of its dataset came
once. What an epoch holds depends on nothing but (seed, epoch).
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def shares(sizes: Sequence[int], mix: Sequence[float]) -> tuple[int, ...]:
    """Rows of each dataset in an epoch, in all as many as there are rows (largest remainders).

    >>> shares([100, 10], [1, 1]), shares([7, 7, 7], [4, 4, 2])
    ((55, 55), (9, 8, 4))
    """
    total, weight = sum(sizes), sum(mix)
    exact = [total * one / weight for one in mix]
    counts = [int(one) for one in exact]
    rest = sorted(range(len(mix)), key=lambda n: (counts[n] - exact[n], n))
    for n in rest[: total - sum(counts)]:
        counts[n] += 1
    return tuple(counts)


def epoch(sizes: Sequence[int], counts: Sequence[int], seed: int, number: int) -> list[int]:
    """The rows of epoch `number`, in training's order; datasets' rows are numbered one after another."""
    chosen: list[int] = []
    first = 0
    for which, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        at, end = number * count, (number + 1) * count
        while at < end:
            lap, place = divmod(at, size)
            order = list(range(first, first + size))
            random.Random(f"{seed}/{which}/{lap}").shuffle(order)
            taken = order[place : place + end - at]
            chosen += taken
            at += len(taken)
        first += size
    random.Random(f"{seed}/{number}").shuffle(chosen)
    return chosen
