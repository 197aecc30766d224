"""Logprobs equal those of one plain pass, whatever was cached, cut into chunks or preempted."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from herdbook.engine.engine import Engine
from herdbook.engine.reading import PromptLogprobs
from herdbook.engine.request import Logprob, Request, Sampling
from herdbook.errors import RequestError
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Packed

from .conftest import VOCAB, prompts
from .test_engine import Letters, all_free


@torch.inference_mode()
def plain(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    """[T, V]: row i tells of the token after ids[i]."""
    logits = decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))
    return torch.log_softmax(logits.float(), dim=-1)


def same(told: Logprob, row: torch.Tensor, id: int, top: int) -> None:
    assert told.id == id
    assert told.logprob == pytest.approx(float(row[id]), abs=1e-4)
    assert abs(told.rank - 1 - int((row > row[id] + 1e-4).sum())) <= 1
    values = [logprob for _, logprob in told.top]
    assert values == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
    assert all(float(row[i]) == pytest.approx(value, abs=1e-4) for i, value in told.top)


def check(decoder: Decoder, ids: list[int], reply: Any, top: int) -> None:
    """Prompt and reply of one Reply against the plain pass over both."""
    rows = plain(decoder, [*ids, *reply.ids])
    assert reply.prompt_logprobs[0] is None and len(reply.prompt_logprobs) == len(ids)
    for place, told in enumerate(reply.prompt_logprobs[1:], start=1):
        same(told, rows[place - 1], ids[place], top)
    assert len(reply.logprobs) == len(reply.ids)
    for place, told in enumerate(reply.logprobs, start=len(ids)):
        same(told, rows[place - 1], reply.ids[place - len(ids)], top)


@pytest.mark.parametrize("max_batch_tokens", [1, 3, 7, 512])
@pytest.mark.parametrize("top", [0, 5])
def test_equal_a_plain_pass(decoder: Decoder, max_batch_tokens: int, top: int) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=200, max_batch_tokens=max_batch_tokens)
    asked = prompts(4, 1, 30)
    sampling = Sampling(max_tokens=6, logprobs=top, prompt_logprobs=top)
    for _ in range(2):  # the second time every page is known
        replies = engine.generate([Request(ids, sampling) for ids in asked])
        for ids, reply in zip(asked, replies, strict=True):
            assert reply.cached_tokens == 0
            check(decoder, ids, reply, top)
    assert all_free(engine)


def test_others_in_the_batch_notice_nothing(decoder: Decoder) -> None:
    engine = Engine(decoder, None, page_tokens=4, pages=200, max_batch_tokens=16)
    asked = prompts(6, 10, 30, seed=2)
    expected = engine.generate([Request(ids, Sampling(max_tokens=6)) for ids in asked])
    settings = [Sampling(max_tokens=6, prompt_logprobs=2 if at % 2 else None) for at in range(6)]
    replies = engine.generate([Request(ids, s) for ids, s in zip(asked, settings, strict=True)])
    assert [one.ids for one in replies] == [one.ids for one in expected]
    assert [one.prompt_logprobs is not None for one in replies] == [False, True] * 3
    assert all(one.logprobs is None for one in replies)
    assert [one.cached_tokens > 0 for one in replies] == [True, False] * 3


def test_preempted_in_the_middle(decoder: Decoder) -> None:
    engine = Engine(decoder, None, page_tokens=2, pages=24, max_batch_tokens=5)
    asked = prompts(4, 8, 14, seed=5)
    sampling = Sampling(max_tokens=14, logprobs=3, prompt_logprobs=3)
    replies = engine.generate([Request(ids, sampling) for ids in asked])
    assert engine.stats()["preemptions"] > 0
    for ids, reply in zip(asked, replies, strict=True):
        check(decoder, ids, reply, 3)


def test_each_is_told_once(decoder: Decoder) -> None:
    """Preempted in the prompt, then computed anew in chunks that end before what is told already."""
    again = 0
    ids = prompts(1, 50, 50, seed=9)[0]
    for seed in range(20, 27):
        dice = random.Random(seed)
        pages, budget = dice.randint(10, 16), dice.randint(3, 6)
        engine = Engine(decoder, None, page_tokens=8, pages=pages, max_batch_tokens=budget)
        for short in prompts(3, 4, 12, seed=seed):
            engine.submit(Request(short, Sampling(max_tokens=40)))
        for _ in range(dice.randint(3, 20)):
            engine.step()
        sampling = Sampling(max_tokens=4, logprobs=2, prompt_logprobs=2)
        engine.submit(Request(ids, sampling, id="long"))
        one = engine._active["long"]
        assert isinstance(one.reading, PromptLogprobs)
        while not one.finish:
            before = one.computed
            engine.step()
            again += before < one.computed < one.reading.rest.start
        check(decoder, ids, one.reply(), 2)
    assert again, "never computed anew"


def test_the_first_piece_tells_of_the_prompt(decoder: Decoder) -> None:
    engine = Engine(decoder, None)
    request = Request([3, 1, 4, 1], Sampling(max_tokens=3, logprobs=1, prompt_logprobs=0))
    pieces = list(engine.stream(request))
    assert [piece.prompt_logprobs is not None for piece in pieces] == [True, False, False]
    assert [[one.id for one in piece.logprobs] for piece in pieces] == [
        list(piece.ids) for piece in pieces
    ]
    reply = pieces[-1].reply
    assert reply and reply.prompt_logprobs == pieces[0].prompt_logprobs
    assert reply.logprobs == tuple(one for piece in pieces for one in piece.logprobs)


def test_they_are_of_the_raw_distribution(decoder: Decoder) -> None:
    """What steers the draw does not change what is told."""
    engine = Engine(decoder, None)
    ids = prompts(1, 9, 9)[0]
    rows = plain(decoder, ids)
    worst = int(rows[-1].argmin())
    settings = Sampling(
        max_tokens=1, temperature=2.0, seed=1, logit_bias={worst: 100}, repetition_penalty=3.0,
        logprobs=20,
    )  # fmt: skip
    (reply,) = engine.generate([Request(ids, settings)])
    assert reply.ids == (worst,) and reply.logprobs and reply.logprobs[0].rank == VOCAB
    same(reply.logprobs[0], rows[-1], worst, 20)


def test_bias_and_min_tokens(decoder: Decoder) -> None:
    engine = Engine(decoder, Letters())  # type: ignore[arg-type]
    ids = prompts(1, 9, 9)[0]

    def ask(**settings: Any) -> Any:
        return engine.generate([Request(ids, Sampling(max_tokens=8, **settings))])[0]

    end = {0: 100}
    assert ask(logit_bias=end).ids == (0,) and ask(logit_bias=end).finish == "stop"
    late = ask(logit_bias=end, min_tokens=3)
    assert len(late.ids) == 4 and late.ids[-1] == 0 and 0 not in late.ids[:3]
    assert late.finish == "stop" and len(late.text) == 3
    assert ask(logit_bias=end, ignore_eos=True).ids == (0,) * 8
    assert ask(logit_bias={7: 100}).ids == (7,) * 8
    stopped = ask(logit_bias={7: 100}, stop_token_ids=[7])
    assert (stopped.ids, stopped.text, stopped.finish) == ((7,), "", "stop")
    late = ask(logit_bias={7: 100}, stop_token_ids=[7], min_tokens=2, ignore_eos=True)
    assert late.ids[2:] == (7,) and 7 not in late.ids[:2]
    letter = Letters().decode([7])
    early, late = (ask(logit_bias={7: 100}, stop=(letter,), min_tokens=least) for least in (0, 4))
    assert (early.text, early.finish, len(early.ids)) == ("", "stop", 1)
    assert (late.text, late.finish, len(late.ids)) == (letter * 4, "stop", 5)
    banned = ask(logit_bias={late.ids[0]: -100})
    assert late.ids[0] not in banned.ids


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"logit_bias": {VOCAB: 1}}, f"logit_bias: token id {VOCAB} is outside"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: token id -1 is outside"),
    ],
)
def test_ids_outside_the_vocabulary(decoder: Decoder, settings: Any, part: str) -> None:
    engine = Engine(decoder, None)
    with pytest.raises(RequestError, match=part):
        engine.submit(Request([1], Sampling(**settings)))
    assert all_free(engine)


SEEDED = [Sampling(max_tokens=12, temperature=1.3, top_p=0.95, seed=seed) for seed in range(8)]


def test_a_seeds_reply_is_the_same_in_any_company(decoder: Decoder) -> None:
    """Alone, in a batch of eight, streamed, and behind a prefix that is cached or not."""
    asked = prompts(8, 3, 30, seed=9)
    requests = [Request(ids, sampling) for ids, sampling in zip(asked, SEEDED, strict=True)]
    alone = [Engine(decoder, None).generate([one])[0].ids for one in requests]
    engine = Engine(decoder, None, page_tokens=4, max_batch_tokens=16)
    assert [one.ids for one in engine.generate(requests)] == alone
    assert [one.ids for one in engine.generate(requests)] == alone  # from the cache
    for request, expected in zip(requests, alone, strict=True):
        streamed = [id for piece in engine.stream(request) for id in piece.ids]
        assert tuple(streamed) == expected
