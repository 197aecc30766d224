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


def test_a_hit_counts_as_use() -> None:
    pool = PagePool(4, SIZE)
    old, new = [1, 2, 3, 4], [5, 6, 7, 8]
    for ids in (old, new):
        pool.release(fill(pool, ids))
    hit = pool.match(chain([*old, 9], SIZE), [*old, 9])
    pool.hold(hit)
    pool.release(hit)
    pool.allocate(2)
    assert pool.match(chain([*new, 9], SIZE), [*new, 9]) == []
    assert pool.match(chain([*old, 9], SIZE), [*old, 9]) == hit


def test_a_twin_in_use_outlives_the_known_page() -> None:
    """Two that compute the same at the same time: what the one knows is not lost with the other."""
    pool = PagePool(4, SIZE)
    ids = [1, 2, 3, 4]
    one, two = pool.allocate(2), pool.allocate(2)
    for page, key, at in zip(one[:1] + two, [chain(ids, SIZE)[i] for i in (0, 0, 1)], (0, 0, 2)):  # noqa: B905
        pool.register(page, key, ids[at : at + SIZE])
    pool.release(one)
    assert pool.allocate(2) == [one[1], one[0]]  # the known first page is gone
    assert pool.match(chain([*ids, 5], SIZE), [*ids, 5]) == []
    pool.release(two)
    assert pool.match(chain([*ids, 5], SIZE), [*ids, 5]) == two


class Pool(RuleBasedStateMachine):
    """Any order of requests, growth and release, against a plain list of what each page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, SIZE)
        self.held: list[tuple[list[int], list[int]]] = []  # ids, pages
        self.contents: dict[int, tuple[int, ...]] = {}  # what a tensor would hold: the full prefix
        self.clock = 0
        self.used: dict[tuple[int, ...], tuple[int, int]] = {}  # contents → when last used

    def cache(self) -> dict[int, tuple[int, ...]]:
        free = [p for p in range(self.pool.pages) if not self.pool.references[p]]
        return {p: self.contents[p] for p in free if self.pool._hash[p] is not None}

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
        before = self.cache()
        new = self.pool.allocate(need)
        evicted = [self.used[before[p]] for p in new if p in before]
        kept = [self.used[contents] for contents in self.cache().values()]
        assert not evicted or not kept or max(evicted) < min(kept), "not the least recently used"
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
        ids, pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(pages)
        self.clock += 1
        for n in range(SIZE, len(ids) + 1, SIZE):
            self.used[tuple(ids[:n])] = (self.clock, -n)  # the prefix later than the suffix

    @precondition(lambda self: not self.held)
    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.used.clear()
        assert self.pool.cached == 0

    @rule(ids=st.lists(st.integers(0, 1), min_size=SIZE, max_size=6), times=st.integers(2, 3))
    def twins(self, ids: list[int], times: int) -> None:
        """Several compute the same at the same time, so none can hit the others' pages."""
        keys = chain(ids, SIZE)
        need = self.pool.pages_for(len(ids))
        if self.pool.match(keys, ids) or times * need > self.pool.free:
            return
        mine = [self.pool.allocate(need) for _ in range(times)]
        for run in mine:
            for i, page in enumerate(run):
                self.contents[page] = tuple(ids[: (i + 1) * SIZE])
            for i, key in enumerate(keys):
                self.pool.register(run[i], key, ids[i * SIZE : (i + 1) * SIZE])
            self.held.append((ids, run))

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
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
