"""The page pool: hits, eviction order, and its invariants under any sequence of calls."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from herdbook.engine import pages
from herdbook.engine.pages import PagePool, chain

SIZE = 2


def fill(pool: PagePool, ids: list[int]) -> list[int]:
    """Hold pages for `ids` as the scheduler does: hits first, new ones registered."""
    keys = chain(ids, pool.page_tokens)
    hits = pool.match(keys, ids)
    pool.hold(hits)
    held = hits + pool.allocate(pool.pages_for(len(ids)) - len(hits))
    for i in range(len(hits), len(keys)):
        pool.register(held[i], keys[i], ids[i * pool.page_tokens : (i + 1) * pool.page_tokens])
    return held


def test_chain_covers_everything_before() -> None:
    first, second = chain([1, 2, 3, 4, 5], SIZE)
    assert chain([1, 2, 3, 4], SIZE) == [first, second]
    assert chain([9, 2, 3, 4], SIZE)[1] != second
    assert chain([1, 2, 3, 4], SIZE, known=[first]) == [first, second]


def test_shared_prefix_is_held_twice() -> None:
    pool = PagePool(8, SIZE)
    one = fill(pool, [1, 2, 3, 4, 5])
    two = fill(pool, [1, 2, 3, 4, 6])
    assert one[:2] == two[:2] and one[2] != two[2]
    assert [pool.references[p] for p in one] == [2, 2, 1]
    pool.release(one)
    assert [pool.references[p] for p in one] == [1, 1, 0]


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    pool = PagePool(8, SIZE)
    ids = [1, 2, 3, 4]
    held = fill(pool, ids)
    assert pool.match(chain(ids, SIZE), ids) == held[:1]
    assert pool.match(chain([*ids, 5], SIZE), [*ids, 5]) == held


def test_freed_pages_are_known_until_reallocated_suffix_first() -> None:
    pool = PagePool(4, SIZE)
    old = fill(pool, [1, 2, 3, 4])
    pool.release(old)
    new = fill(pool, [5, 6, 7, 8])
    pool.release(new)
    assert pool.cached == 4
    assert pool.allocate(1) == [old[1]]  # least recently freed; suffix before prefix
    assert pool.allocate(1) == [old[0]]
    assert pool.match(chain([5, 6, 7, 8, 9], SIZE), [5, 6, 7, 8, 9]) == new


def test_pages_without_contents_worth_keeping_go_first() -> None:
    pool = PagePool(2, SIZE)
    full, partial = fill(pool, [1, 2, 3])
    pool.release([full, partial])
    assert pool.allocate(1) == [partial]


def test_a_hash_collision_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "page_hash", lambda before, tokens: b"same")
    pool = PagePool(4, SIZE)
    fill(pool, [1, 2, 3])
    assert pool.match(chain([8, 9, 3], SIZE), [8, 9, 3]) == []
    assert len(pool.match(chain([1, 2, 3], SIZE), [1, 2, 3])) == 1


class Pool(RuleBasedStateMachine):
    """Any order of requests, growth and release, against a plain list of what each page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, SIZE)
        self.held: list[tuple[list[int], list[int]]] = []  # ids, pages
        self.contents: dict[int, tuple[int, ...]] = {}  # what a tensor would hold: the full prefix

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def request(self, ids: list[int]) -> None:
        keys = chain(ids, SIZE)
        hits = self.pool.match(keys, ids)
        assert len(hits) * SIZE < len(ids)
        for i, page in enumerate(hits):
            assert self.contents[page] == tuple(ids[: (i + 1) * SIZE]), "a hit with other tokens"
        need = self.pool.pages_for(len(ids)) - len(hits)
        if need > self.pool.free_after(hits):
            return
        self.pool.hold(hits)
        new = self.pool.allocate(need)
        held_by_others = {p for _, ps in self.held for p in ps}
        assert not held_by_others & set(new), "allocated a page in use"
        pages = hits + new
        for i in range(len(hits), len(pages)):
            self.contents[pages[i]] = tuple(ids[: (i + 1) * SIZE])
        for i in range(len(hits), len(keys)):
            self.pool.register(pages[i], keys[i], ids[i * SIZE : (i + 1) * SIZE])
        self.held.append((ids, pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(pages)

    @invariant()
    def sound(self) -> None:
        self.pool.check()
        for page in range(self.pool.pages):
            holders = sum(page in pages for _, pages in self.held)
            assert self.pool.references[page] == holders
        used = {p for _, pages in self.held for p in pages}
        assert self.pool.free == self.pool.pages - len(used)
        for ids, held in self.held:
            for i, page in enumerate(held):
                assert self.contents[page] == tuple(ids[: (i + 1) * SIZE]), "overwritten in use"


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
