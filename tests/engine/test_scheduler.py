"""The scheduler under any order of requests, priorities, aborts and drafts, with a small pool."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.engine.engine import Engine
from herdbook.engine.pages import PagePool
from herdbook.engine.request import Request, Sampling
from herdbook.engine.sampling import Chooser
from herdbook.engine.scheduler import Scheduler
from herdbook.engine.sequence import Sequence
from herdbook.engine.text import TextOut
from herdbook.errors import RequestError
from herdbook.model.decoder import Decoder

from .conftest import naive, prompts, tiny

requests = st.lists(
    st.tuples(
        st.integers(0, 6),  # the step in which it comes
        st.lists(st.integers(0, 2), min_size=1, max_size=20),
        st.integers(-1, 1),  # priority
        st.integers(1, 12),  # tokens of the reply
        st.one_of(st.none(), st.integers(0, 15)),  # the step in which it is aborted
    ),
    min_size=1,
    max_size=8,
)


def sequence(ids: list[int], priority: int, limit: int) -> Sequence:
    request = Request(ids, Sampling(max_tokens=limit), priority=priority)
    return Sequence(request, limit, Chooser(request.sampling, ids, 3), TextOut(None, ()))


@settings(max_examples=300, deadline=None)
@given(
    asked=requests,
    page_tokens=st.integers(1, 4),
    spare=st.integers(0, 12),
    max_batch_tokens=st.integers(1, 12),
    data=st.data(),
)
def test_every_request_ends(
    asked: list[tuple[int, list[int], int, int, int | None]],
    page_tokens: int,
    spare: int,
    max_batch_tokens: int,
    data: st.DataObject,
) -> None:
    longest = max(len(ids) + limit for _, ids, _, limit, _ in asked)
    pool = PagePool(-(-longest // page_tokens) + spare, page_tokens)
    scheduler = Scheduler(pool, max_batch_tokens)
    todo = [(at, sequence(ids, p, limit), stop) for at, ids, p, limit, stop in asked]
    drafts = data.draw(st.integers(0, 3))
    alive: list[Sequence] = []
    work = sum(len(ids) + limit for _, ids, _, limit, _ in asked)
    for step in range(20 * work):
        for at, one, stop in todo:
            if at == step:
                scheduler.add(one)
                alive.append(one)
            if stop == step and one in alive:
                scheduler.remove(one)
                alive.remove(one)
        decoding = [one for one in scheduler.running if one.remaining == 1]
        in_prompt = [one for one in scheduler.running if one.remaining > 1]
        batch = scheduler.schedule()
        assert bool(batch) == bool(alive), "an idle step"
        assert len({id(one) for one in batch}) == len(batch)
        assert sum(one.scheduled for one in batch) <= max_batch_tokens
        assert scheduler.running == sorted(scheduler.running, key=lambda one: one.turn)
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda one: one.turn)
        # who decoded goes on, and so does the most urgent prompt, unless preempted
        running = set(map(id, scheduler.running))
        in_batch = set(map(id, batch))
        assert all(id(one) in in_batch for one in decoding if id(one) in running)
        prompts = [one for one in in_prompt if id(one) in running]
        assert not prompts or id(prompts[0]) in in_batch
        for one in batch:
            assert len(one.pages) * page_tokens >= one.computed + one.scheduled
        for one in batch:
            if drafts and one.remaining == 1 == one.scheduled:
                worth = min(drafts, one.limit - one.reply_tokens - 1)
                one.try_out([0] * scheduler.extend(one, worth))
                assert len(one.pages) * page_tokens >= one.computed + one.scheduled
                assert one.wanted == 1 + len(one.drafts)
        guessed = [one.withdraw() for one in batch]
        ready = [one.wanted > 0 for one in batch]
        scheduler.advance(batch)
        for one, tried, drawn in zip(batch, guessed, ready, strict=True):
            if not drawn:
                continue
            one.append(step % 3)
            if tried and step % 2:  # the first was right
                scheduler.progress(one, 1)
                one.append(step % 3)
            if one.reply_tokens >= one.limit:
                scheduler.remove(one)
                alive.remove(one)
            else:
                scheduler.trim(one)
        pool.check()
        held = {page for one in alive for page in one.pages}
        assert pool.pages - pool.free == len(held), "a leak"
        if not alive and all(at <= step for at, *_ in todo):
            break
    assert not alive
    assert pool.free == pool.pages


def engine(decoder: Decoder, **settings: int) -> Engine:
    return Engine(decoder, None, page_tokens=4, **settings)


def ended(engine: Engine) -> list[str]:
    order: list[str] = []
    while engine.busy:
        order += [piece.request_id for piece in engine.step() if piece.finish]
    return order


def test_the_lowest_number_is_served_first(decoder: Decoder) -> None:
    one_by_one = engine(decoder, pages=6, max_batch_tokens=8)
    for priority, ids in zip((1, 0, 5, 0, -3), prompts(5, 10, 12), strict=True):
        id = f"{priority}"
        while id in one_by_one._active:
            id += "'"
        one_by_one.submit(Request(ids, Sampling(max_tokens=5), id=id, priority=priority))
    assert ended(one_by_one) == ["-3", "0", "0'", "1", "5"]


def test_the_least_urgent_is_preempted(decoder: Decoder) -> None:
    """The urgent one came last, and yet it is the first one that gives up its pages."""
    tight = engine(decoder, pages=12, max_batch_tokens=16)
    asked = prompts(3, 8, 8, seed=2)
    for id, priority in (("a", 1), ("b", 1), ("urgent", 0)):
        ids = asked["ab".find(id)]
        tight.submit(Request(ids, Sampling(max_tokens=24), id=id, priority=priority))
    replies = {}
    while tight.busy:
        replies |= {piece.request_id: piece.reply for piece in tight.step() if piece.reply}
    assert list(replies) == ["urgent", "a", "b"] and tight.stats()["preemptions"] > 0
    for id, reply in replies.items():
        assert reply is not None
        assert list(reply.ids) == naive(decoder, asked["ab".find(id)], 24)


def test_a_priority_is_a_number(decoder: Decoder) -> None:
    with pytest.raises(RequestError, match="priority='high' must be a whole number"):
        engine(decoder).submit(Request([1], priority="high"))  # type: ignore[arg-type]


def test_hit_rate() -> None:
    shared = engine(tiny(), pages=40)
    ids = prompts(1, 16, 16)[0]
    assert shared.stats()["prefix_hit_rate"] == 0.0
    for _ in range(2):
        shared.generate([Request(ids, Sampling(max_tokens=2))])
    assert shared.stats()["prefix_hit_rate"] == 12 / 32
