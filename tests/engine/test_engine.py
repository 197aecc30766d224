"""The engine equals naive decoding, whatever it does to be faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from herdbook.engine import paged
from herdbook.engine.engine import Engine
from herdbook.engine.request import Piece, Reply, Request, Sampling
from herdbook.engine.sequence import Sequence
from herdbook.errors import CapacityError, FileError, RequestError
from herdbook.model.decoder import Decoder

from .conftest import VOCAB, naive, prompts, tiny


class Letters:
    """A tokenizer of one character a token: id 0 ends a turn, others are letters."""

    size = VOCAB
    bos_id = None
    eos_id = 0
    stop_ids = frozenset({0})
    chat_template = None

    def stream(self) -> Letters:
        return self

    def push(self, id: int) -> str:
        return self.decode([id])

    def flush(self) -> str:
        return ""

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 0x4E00 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)


def greedy(engine: Engine, asked: list[list[int]], tokens: int = 12) -> list[Reply]:
    requests = [Request(ids, Sampling(max_tokens=tokens)) for ids in asked]
    return engine.generate(requests)


def all_free(engine: Engine) -> bool:
    engine.pool.check()
    return engine.pool.free == engine.pool.pages and not engine.busy


@pytest.mark.parametrize("page_tokens", [1, 4, 16])
@pytest.mark.parametrize("max_batch_tokens", [1, 3, 7, 512])
def test_equals_naive_under_batching_and_chunks(
    decoder: Decoder, page_tokens: int, max_batch_tokens: int
) -> None:
    engine = Engine(
        decoder, None, page_tokens=page_tokens, pages=600 // page_tokens,
        max_batch_tokens=max_batch_tokens,
    )  # fmt: skip
    asked = prompts(6)
    for ids, reply in zip(asked, greedy(engine, asked), strict=True):
        assert list(reply.ids) == naive(decoder, ids, 12)
        assert reply.finish == "length" and reply.prompt_tokens == len(ids)
    stats = engine.stats()
    computed = stats["prefill_tokens"] + stats["decode_tokens"]
    assert computed == sum(map(len, asked)) + 6 * 11 - stats["cached_tokens"]
    assert all_free(engine)


@pytest.mark.parametrize("windows", [(3, 3), (None, 5), (20, None)])
def test_equals_naive_with_sliding_windows(windows: tuple[int | None, ...]) -> None:
    decoder = tiny(windows=windows)
    asked = prompts(4, 20, 40)
    for max_batch_tokens in (5, 512):
        engine = Engine(decoder, None, page_tokens=4, pages=200, max_batch_tokens=max_batch_tokens)
        for ids, reply in zip(asked, greedy(engine, asked), strict=True):
            assert list(reply.ids) == naive(decoder, ids, 12)


def test_prefix_hits_change_nothing_but_the_work(decoder: Decoder) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=100)
    prefix, *tails = prompts(5, 9, 18, seed=3)
    asked = [prefix + tail for tail in tails]
    first = greedy(engine, asked[:1])[0]
    assert first.cached_tokens == 0
    for ids, reply in zip(asked[1:], greedy(engine, asked[1:]), strict=True):
        assert reply.cached_tokens == len(prefix) // 4 * 4 > 0
        assert list(reply.ids) == naive(decoder, ids, 12)
    # a conversation that goes on finds its own reply in the cache too
    longer = asked[0] + list(first.ids) + tails[1]
    again = greedy(engine, [longer])[0]
    assert again.cached_tokens == (len(asked[0]) + 11) // 4 * 4
    assert list(again.ids) == naive(decoder, longer, 12)
    assert engine.stats()["cached_tokens"] > 0


def test_requests_that_come_together_share_their_prefix(decoder: Decoder) -> None:
    """Nobody computes a page that someone else is computing at this moment."""
    engine = Engine(decoder, None, page_tokens=4, pages=200, max_batch_tokens=64)
    prefix, *tails = prompts(9, 3, 5, seed=4)
    prefix = prefix * 10
    asked = [prefix + tail for tail in tails]
    replies = greedy(engine, asked)
    shared = len(prefix) // 4 * 4
    assert [reply.cached_tokens >= shared for reply in replies] == [False] + [True] * 7
    for ids, reply in zip(asked, replies, strict=True):
        assert list(reply.ids) == naive(decoder, ids, 12)


def test_the_same_prompt_twice(decoder: Decoder) -> None:
    """Even when all of it is cached, its last page is computed: its logits are wanted."""
    engine = Engine(decoder, None, page_tokens=4, pages=50)
    ids = prompts(1, 16, 16)[0]
    expected = naive(decoder, ids, 12)
    for cached in (0, 12):
        reply = greedy(engine, [ids])[0]
        assert (list(reply.ids), reply.cached_tokens) == (expected, cached)


def test_forget(decoder: Decoder) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=50)
    ids = prompts(1, 16, 16)[0]
    greedy(engine, [ids])
    engine.forget()
    assert engine.stats()["pages_cached"] == 0
    assert greedy(engine, [ids])[0].cached_tokens == 0
    engine.submit(Request(ids))
    engine.step()
    with pytest.raises(AssertionError, match="while pages are used"):
        engine.forget()


@pytest.mark.parametrize("pages", [13, 16, 20])
def test_equals_naive_under_preemption(decoder: Decoder, pages: int) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=pages, max_batch_tokens=16)
    asked = prompts(6, 5, 12, seed=5)
    for ids, reply in zip(asked, greedy(engine, asked, 40), strict=True):
        assert list(reply.ids) == naive(decoder, ids, 40)
    assert engine.scheduler.preemptions > 0
    assert all_free(engine)


def test_a_reply_ends_where_the_pages_end(decoder: Decoder) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=5)
    ids = prompts(1, 15, 15)[0]
    reply = greedy(engine, [ids], 40)[0]
    assert reply.finish == "length" and list(reply.ids) == naive(decoder, ids, 5)


def test_a_reply_ends_where_the_context_ends() -> None:
    decoder = tiny(max_pos=24)
    ids = prompts(1, 20, 20)[0]
    reply = greedy(Engine(decoder, None), [ids], 40)[0]
    assert reply.finish == "length" and list(reply.ids) == naive(decoder, ids, 4)


def test_what_never_fits_is_refused_with_the_numbers(decoder: Decoder) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=5)
    with pytest.raises(CapacityError) as caught:
        engine.submit(Request([1] * 20))
    assert str(caught.value) == (
        "a prompt of 20 tokens does not fit: the cache has 5 pages of 4 tokens, 20 in all\n"
        "  next: shorten the prompt, or give the engine more cache_bytes"
    )
    with pytest.raises(CapacityError) as caught:
        Engine(tiny(max_pos=24), None).submit(Request([1] * 24))
    assert "a prompt of 24 tokens leaves no room for a reply" in str(caught.value)
    assert "the model's context is 24 tokens" in str(caught.value)
    assert not engine.busy


def test_a_refused_request_takes_the_others_of_its_call_back(decoder: Decoder) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=5)
    with pytest.raises(CapacityError):
        greedy(engine, [[1, 2], [1] * 20])
    assert all_free(engine)


def test_cache_bytes(decoder: Decoder) -> None:
    token = 2 * 2 * 2 * 8 * 4  # keys and values × layers × kv_heads × head_dim × float32
    exact = torch.float32
    assert Engine(decoder, None, cache_bytes=token * 16 * 3 + 5, cache_dtype=exact).pool.pages == 3
    with pytest.raises(CapacityError, match=f"cache_bytes=9 holds no page.*{token * 16} bytes"):
        Engine(decoder, None, cache_bytes=9, cache_dtype=exact)
    assert Engine(decoder, None).pool.tokens == 16 * 256  # never more than 16 contexts


def test_the_cache_takes_fewer_bits_where_a_context_would_not_fit(decoder: Decoder) -> None:
    numbers = 2 * 2 * 2 * 8  # of a token: keys and values × layers × kv_heads × head_dim
    scales = 2 * 2 * 2 * 4  # bytes
    context = decoder.config.max_pos
    for room, kind in (
        (numbers * 4, torch.float32),
        (numbers * 4 - 1, torch.bfloat16),
        (numbers * 2 - 1, torch.int8),
        (numbers + scales, torch.int8),
    ):
        engine = Engine(decoder, None, cache_bytes=room * context)
        assert engine.runner.kind == str(kind).removeprefix("torch.")
        beside = Engine(decoder, None, cache_bytes=(room + numbers * 4) * context, draft=decoder)
        assert beside.runner.kind == engine.runner.kind  # a draft's want their place too
        assert (
            engine.pool.tokens
            == context
            * room
            // (numbers * kind.itemsize + scales * (kind == torch.int8))
            // 16
            * 16
        )


@pytest.mark.parametrize(("kind", "most"), [(torch.bfloat16, 0.01), (torch.int8, 0.08)])
def test_a_smaller_cache_stays_near(decoder: Decoder, kind: torch.dtype, most: float) -> None:
    """Logits with it differ by so much of their spread, prefix hits and chunks included."""

    def logits(dtype: torch.dtype) -> Tensor:
        found: list[Tensor] = []
        engine = Engine(
            decoder, None, page_tokens=4, pages=64, cache_dtype=dtype, max_batch_tokens=8
        )
        run = engine.runner.run

        def heard(batch: list[Sequence]) -> np.ndarray | None:
            rows = run(batch)
            found.extend([] if rows is None else torch.from_numpy(rows))
            return rows

        engine.runner.run = heard  # type: ignore[method-assign]
        for _ in range(2):
            greedy(engine, [list(range(1, 30))], 1)
        return torch.stack(found)

    exact, near = logits(torch.float32), logits(kind)
    off = (near - exact).abs().max() / exact.std()
    assert 0 < off <= most


def test_wrong_requests(decoder: Decoder) -> None:
    engine = Engine(decoder, None)
    with pytest.raises(RequestError, match="empty prompt"):
        engine.submit(Request([]))
    with pytest.raises(RequestError, match=f"token id {VOCAB} is outside .* {VOCAB} tokens"):
        engine.submit(Request([1, VOCAB]))
    with pytest.raises(RequestError, match="needs a tokenizer"):
        engine.submit(Request([1], Sampling(stop=("x",))))
    engine.submit(Request([1], id="one"))
    with pytest.raises(RequestError, match="'one' is already running"):
        engine.submit(Request([2], id="one"))
    assert engine.abort("one") and not engine.abort("one") and not engine.abort("none")


def test_no_head_no_reply() -> None:
    decoder = Decoder(tiny().config, headless=True)
    with pytest.raises(FileError, match="no head"):
        Engine(decoder, None).submit(Request([1]))


def test_abort_frees_the_pages_and_harms_nobody(decoder: Decoder) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=60, max_batch_tokens=32)
    asked = prompts(4, 20, 30, seed=6)
    for i, ids in enumerate(asked):
        engine.submit(Request(ids, Sampling(max_tokens=15), id=str(i)))
    seen: list[Piece] = []
    for _ in range(4):
        seen += engine.step()
    used = engine.stats()["pages_used"]
    assert engine.abort("0")  # decoding
    assert engine.abort("3")  # waiting, or in its prompt
    assert engine.stats()["pages_used"] < used
    while engine.busy:
        seen += engine.step()
    replies = {piece.request_id: piece.reply for piece in seen if piece.reply}
    assert {id: reply.finish for id, reply in replies.items()} == {
        "0": "abort", "1": "length", "2": "length", "3": "abort",
    }  # fmt: skip
    for i in (1, 2):
        assert list(replies[str(i)].ids) == naive(decoder, asked[i], 15)
    assert all_free(engine)


def test_prompts_and_decoding_go_on_together(decoder: Decoder) -> None:
    """A long prompt does not hold up a running reply, nor running replies a prompt."""
    engine = Engine(decoder, None, page_tokens=4, pages=200, max_batch_tokens=8)
    engine.submit(Request([1, 2, 3], Sampling(max_tokens=50), id="short"))
    engine.step()
    engine.submit(Request(prompts(1, 200, 200)[0], Sampling(max_tokens=5), id="long"))
    pieces = [piece for _ in range(40) for piece in engine.step()]
    assert sum(piece.request_id == "short" for piece in pieces) == 40
    assert any(piece.request_id == "long" and piece.finish for piece in pieces)


def test_first_come_first_served(decoder: Decoder) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=9, max_batch_tokens=4)
    for i, ids in enumerate(prompts(5, 8, 8)):
        engine.submit(Request(ids, Sampling(max_tokens=3), id=str(i)))
    order = []
    while engine.busy:
        order += [piece.request_id for piece in engine.step() if piece.finish]
    assert order == ["0", "1", "2", "3", "4"]


def test_a_seed_gives_the_same_reply_alone_and_in_any_batch(decoder: Decoder) -> None:
    asked = prompts(5, 5, 20, seed=7)
    requests = [
        Request(ids, Sampling(max_tokens=20, temperature=1.0, top_p=0.95, seed=i))
        for i, ids in enumerate(asked)
    ]

    def again(of: list[Request]) -> list[Request]:
        return [Request(one.ids, one.sampling) for one in of]

    together = Engine(decoder, None, max_batch_tokens=16).generate(requests)
    tight = Engine(decoder, None, page_tokens=4, pages=16).generate(again(requests)[::-1])
    alone = [Engine(decoder, None).generate(again([one]))[0] for one in requests]
    assert [r.ids for r in together] == [r.ids for r in alone] == [r.ids for r in tight[::-1]]
    other = Sampling(max_tokens=20, temperature=1.0, top_p=0.95, seed=99)
    assert Engine(decoder, None).generate([Request(asked[0], other)])[0].ids != alone[0].ids


def test_penalties_reach_the_engine(decoder: Decoder) -> None:
    ids = prompts(1, 10, 10, seed=8)[0]
    plain, never = Engine(decoder, None).generate(
        [
            Request(ids, Sampling(max_tokens=60)),
            Request(ids, Sampling(max_tokens=60, repetition_penalty=100.0)),
        ]
    )
    assert len(set(plain.ids)) < 60  # a random model goes in circles
    assert not set(never.ids) & set(ids) or len(set(never.ids)) > len(set(plain.ids))


def test_stop_tokens_and_ignore_eos(decoder: Decoder) -> None:
    ids = prompts(1, 10, 10, seed=9)[0]
    expected = naive(decoder, ids, 12)
    tokenizer = Letters()
    tokenizer.stop_ids = frozenset({expected[4]})
    n = expected.index(expected[4]) + 1
    engine = Engine(decoder, tokenizer)  # type: ignore[arg-type]
    stopped, through = engine.generate(
        [
            Request(ids, Sampling(max_tokens=12)),
            Request(ids, Sampling(max_tokens=12, ignore_eos=True)),
        ]
    )
    assert stopped.finish == "stop" and list(stopped.ids) == expected[:n]
    assert stopped.text == tokenizer.decode(expected[: n - 1])
    assert through.finish == "length" and list(through.ids) == expected
    assert through.text == tokenizer.decode(expected)


def test_stop_strings_never_leak(decoder: Decoder) -> None:
    ids = prompts(1, 10, 10, seed=10)[0]
    expected = naive(decoder, ids, 12)
    tokenizer = Letters()
    tokenizer.stop_ids = frozenset()
    text = tokenizer.decode(expected)
    stop = text[3:6]
    before = text[: text.find(stop)]
    engine = Engine(decoder, tokenizer)  # type: ignore[arg-type]
    sampling = Sampling(max_tokens=12, stop=(stop,))
    pieces = list(engine.stream(Request(ids, sampling)))
    assert "".join(piece.text for piece in pieces) == before
    assert pieces[-1].finish == "stop" and pieces[-1].reply is not None
    assert pieces[-1].reply.text == before and len(pieces[-1].reply.ids) == len(before) + 3
    # cut by length in the middle of the stop string: what was held back is shown
    short = Sampling(max_tokens=len(before) + 2, stop=(stop,))
    reply = engine.generate([Request(ids, short)])[0]
    assert reply.finish == "length" and reply.text == text[: len(before) + 2]


def test_streamed_equals_whole(decoder: Decoder) -> None:
    tokenizer = Letters()
    engine = Engine(decoder, tokenizer)  # type: ignore[arg-type]
    ids = prompts(1, 10, 10, seed=11)[0]
    pieces = list(engine.stream(Request(ids, Sampling(max_tokens=12))))
    whole = engine.generate([Request(ids, Sampling(max_tokens=12))])[0]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(i for piece in pieces for i in piece.ids) == whole.ids
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


def test_leaving_a_stream_aborts(decoder: Decoder) -> None:
    engine = Engine(decoder, None)
    stream: Iterator[Piece] = engine.stream(Request([1, 2, 3], Sampling(max_tokens=50)))
    next(stream)
    assert engine.busy
    stream.close()  # type: ignore[attr-defined]
    assert all_free(engine)


def test_a_stream_beside_other_work(decoder: Decoder) -> None:
    """generate() inside a stream: the pieces of the stream wait for it."""
    engine = Engine(decoder, None)
    ids, other = prompts(2, 5, 10, seed=12)
    got: list[int] = []
    for i, piece in enumerate(engine.stream(Request(ids, Sampling(max_tokens=10)))):
        got += piece.ids
        if i == 2:
            assert list(greedy(engine, [other])[0].ids) == naive(decoder, other, 12)
    assert got == naive(decoder, ids, 10)


def test_a_closed_stream_leaves_nothing(decoder: Decoder) -> None:
    """Not even what it said while somebody else's request was computed."""
    engine = Engine(decoder, None)
    stream = engine.stream(Request([1, 2, 3], Sampling(max_tokens=5)))
    next(stream)
    greedy(engine, [[4, 5]])
    stream.close()  # type: ignore[attr-defined]
    assert all_free(engine)


def test_a_call_of_many_requests_looks_each_up_once(decoder: Decoder) -> None:
    class Counted(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    asked = [Request([n], Sampling(max_tokens=2), id=Counted(n)) for n in range(VOCAB)]
    Engine(decoder, None).generate(asked)
    assert Counted.compared < 10 * VOCAB


@torch.no_grad()
def test_one_that_computes_no_numbers_does_not_poison_the_others() -> None:
    """Neither beside it nor in the pages that it leaves behind."""
    decoder = Decoder(dataclasses.replace(tiny().config, tied=False)).eval()
    torch.manual_seed(0)
    for name, weight in decoder.named_parameters():
        weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    decoder.embed.weight[5] = float("nan")
    asked = [[i if i != 5 else 6 for i in ids] for ids in prompts(3, 3, 20, seed=1)]
    for page_tokens in (4, 16):
        engine = Engine(decoder, None, page_tokens=page_tokens, pages=128 // page_tokens)
        requests = [Request(ids, Sampling(max_tokens=10)) for ids in ([5] * 30, *asked)]
        for request in requests:
            engine.submit(request)
        last = {}
        while engine.busy:
            last |= {piece.request_id: piece.reply for piece in engine.step() if piece.reply}
        broken, *whole = (last[request.id] for request in requests)
        assert isinstance(broken.error, ArithmeticError)
        wanted = [tuple(naive(decoder, ids, 10)) for ids in asked]
        assert [one.ids for one in whole] == wanted
        engine.forget()  # so that pages are used in another order
        for _ in range(3):
            assert [one.ids for one in greedy(engine, asked[::-1], 10)][::-1] == wanted


def test_one_broken_request_does_not_end_the_others(decoder: Decoder) -> None:
    class Breaks(Letters):
        def push(self, id: int) -> str:
            raise UnicodeError("torn")

    class Sometimes(Letters):
        first = True

        def stream(self) -> Letters:
            broken, self.first = self.first, False
            return Breaks() if broken else Letters()

    tokenizer = Sometimes()
    tokenizer.stop_ids = frozenset()
    engine = Engine(decoder, tokenizer)  # type: ignore[arg-type]
    a, b = prompts(2, 5, 10, seed=13)
    for id, ids in (("a", a), ("b", b)):
        engine.submit(Request(ids, Sampling(max_tokens=6), id=id))
    last = {}
    while engine.busy:
        last |= {piece.request_id: piece.reply for piece in engine.step() if piece.reply}
    assert last["a"].finish == "error" and str(last["a"].error) == "torn"
    assert last["b"].finish == "length" and list(last["b"].ids) == naive(decoder, b, 6)
    assert all_free(engine)
    tokenizer.first = True
    with pytest.raises(UnicodeError, match="torn"):
        engine.generate([Request(a)])


def test_a_failing_step_leaves_the_engine_usable(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=50)
    ids = prompts(1, 30, 30, seed=14)[0]

    def no_memory(batch: object) -> torch.Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", no_memory)
        with pytest.raises(RuntimeError, match="no memory"):
            greedy(engine, [ids])
    assert all_free(engine)
    assert list(greedy(engine, [ids])[0].ids) == naive(decoder, ids, 12)
    # what was said before it is not lost with it
    for id in "ab":
        engine.submit(Request([1, 2], Sampling(max_tokens=5), id=id))
    engine.step()
    engine.abort("a")
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", no_memory)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.step()
    assert [piece.request_id for piece in engine.step()] == ["a", "b"]


@pytest.mark.parametrize(
    "change", [{}, {"windows": (5, None)}, {"position": "alibi"}], ids=["plain", "window", "alibi"]
)
def test_attention_in_16_bits_is_asked_in_few_shapes(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in chunks, of any length: the same likelihoods, though torch sees few shapes."""
    model = Decoder(dataclasses.replace(tiny().config, **change)).eval()
    model.load_state_dict(tiny().state_dict())
    shapes: set[tuple[int, int]] = set()
    real = paged.attend

    def counted(q: Tensor, k: Tensor, *others: Any, **keys: Any) -> Tensor:
        if q.shape[2] > 1:
            shapes.add((q.shape[2], k.shape[2]))
        return real(q, k, *others, **keys)

    monkeypatch.setattr(paged, "attend", counted)
    told = []
    for multiple in (16, 1):
        monkeypatch.setattr(paged, "SHAPES", multiple)
        shapes.clear()
        engine = Engine(model.bfloat16(), None, max_batch_tokens=37)
        some = [[token % 60 + 3 for token in range(size)] for size in (2, 17, 40, 90)]
        told.append([engine.score(ids[:1], [ids[1:]])[0].logprobs for ids in some])
        assert all(n % multiple == seen % multiple == 0 for n, seen in shapes) and len(shapes) > 2
    for got, want in zip(*told, strict=True):
        assert got == pytest.approx(want, abs=0.06)
