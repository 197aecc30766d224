"""A score is what one plain pass gives, whatever the engine does to be faster."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from herdbook.engine.engine import Engine
from herdbook.engine.reading import Pooled
from herdbook.engine.request import Request, Sampling
from herdbook.engine.score import Score
from herdbook.errors import CapacityError, FileError, RequestError
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_source
from herdbook.model.layout import Packed
from herdbook.model.modules import build

from .conftest import VOCAB, naive, prompts, tiny
from .test_native import CONFIG, needs_native, quantised, rounding

FIXTURES = sorted((Path(__file__).parents[1] / "model" / "families").glob("*.json"))
#: nats a token, in float32: what another order of sums may change
NEAR = 1e-4


@torch.inference_mode()
def plain(decoder: Decoder, prompt: Sequence[int], continuation: Sequence[int]) -> Score:
    """The twin: log_softmax of the whole sequence."""
    start = decoder.prompt(prompt)
    ids = [*start, *continuation]
    logits = decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))
    rows = logits.log_softmax(-1)[len(start) - 1 : -1]
    wanted = torch.tensor(continuation)
    logprobs = rows[torch.arange(len(rows)), wanted]
    return Score(tuple(logprobs.tolist()), bool((rows.argmax(-1) == wanted).all()))


def close(ours: Score, theirs: Score) -> None:
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=NEAR)
    assert ours.greedy == theirs.greedy and ours.tokens == theirs.tokens
    assert ours.total == pytest.approx(theirs.total, abs=NEAR * ours.tokens)


def questions(count: int, seed: int = 0) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts that begin alike, each with continuations that do too, of 1 to 9 tokens."""
    dice = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [dice.randrange(VOCAB) for _ in range(dice.randint(low, high))]

    shots, asked = [some(30, 40), some(20, 30)], []
    for _ in range(count):
        stem = some(1, 4)
        several = [stem, [*stem, *some(1, 5)], [*stem, *some(1, 5)], some(1, 9), some(1, 1)]
        asked.append((dice.choice(shots) + some(3, 20), several))
    return asked


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.stem)
def test_every_family_scores_and_embeds_as_a_plain_pass_does(fixture: Path) -> None:
    source = json.loads(fixture.read_text())
    config = by_source(source, "fixture").config(source, "fixture")
    decoder = build(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.3)
    dice = random.Random(5)
    marks = [config.prefix.whole, config.prefix.start] if config.prefix else []
    engine = Engine(decoder, None, page_tokens=4, pages=64, max_batch_tokens=16)
    asked = []
    for n in (1, 9, 23):
        prompt = [dice.randrange(1, 50) for _ in range(n)] + marks
        a, b, c = ([dice.randrange(1, 50) for _ in range(k)] for k in (1, 3, 6))
        asked.append((prompt, [a, [*b, *a], [*b, *c], c]))
    for (prompt, several), scores in zip(asked, engine.score_many(asked), strict=True):
        for continuation, score in zip(several, scores, strict=True):
            close(score, plain(decoder, prompt, continuation))
    if decoder.whole_prompts:
        return
    prompts = [prompt for prompt, _ in asked]
    for ids, vector in zip(prompts, engine.embed(prompts), strict=True):
        with torch.inference_mode():
            mean = decoder(torch.tensor(ids), Packed([len(ids)])).mean(0)
        assert np.allclose(vector, mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 512])
def test_neither_batch_nor_order_nor_what_ran_before_changes_a_score(
    decoder: Decoder, max_batch_tokens: int
) -> None:
    asked = questions(12)
    expected = [[plain(decoder, ids, one) for one in several] for ids, several in asked]
    engine = Engine(decoder, None, page_tokens=4, pages=300, max_batch_tokens=max_batch_tokens)
    for turn in range(3):  # nothing known, all known, and the other way round
        order = list(range(len(asked)))[:: -1 if turn == 2 else 1]
        found = engine.score_many([asked[n] for n in order])
        for n, scores in zip(order, found, strict=True):
            for score, theirs in zip(scores, expected[n], strict=True):
                close(score, theirs)
    assert engine.pool.free == engine.pool.pages and not engine.busy
    engine.pool.check()


def test_scores_and_chats_in_one_batch_under_preemption(decoder: Decoder) -> None:
    asked = questions(6, seed=2)
    engine = Engine(decoder, None, page_tokens=4, pages=40, max_batch_tokens=16)
    chats = prompts(4, 5, 12, seed=5)
    for number, ids in enumerate(chats):
        engine.submit(Request(ids, Sampling(max_tokens=40), id=str(number)))
    for (ids, several), scores in zip(asked, engine.score_many(asked), strict=True):
        for one, score in zip(several, scores, strict=True):
            close(score, plain(decoder, ids, one))
    replies = {}
    while engine.busy:
        replies |= {piece.request_id: piece.reply for piece in engine.step() if piece.reply}
    for number, ids in enumerate(chats):
        assert list(replies[str(number)].ids) == naive(decoder, ids, 40)
    assert engine.scheduler.preemptions > 0


def test_greedy_is_what_greedy_decoding_writes(decoder: Decoder) -> None:
    ids = prompts(1, 10, 10)[0]
    said = naive(decoder, ids, 6)
    other = [*said[:5], (said[5] + 1) % VOCAB]
    assert [one.greedy for one in Engine(decoder, None).score(ids, [said, other])] == [True, False]


def test_what_begins_alike_is_computed_once(decoder: Decoder) -> None:
    """Four choices of one token: one row; a shared beginning of prompts: its full pages once."""
    engine = Engine(decoder, None, page_tokens=4, pages=300)
    shots, *tails = prompts(21, 9, 9, seed=4)
    shots = shots * 8  # 72 tokens, 18 pages
    engine.score_many([(shots + tail, [[1], [2], [3], [4]]) for tail in tails])
    assert engine.stats()["prefill_tokens"] + engine.stats()["decode_tokens"] == 72 + 20 * 9
    engine.forget()
    before = engine.stats()["prefill_tokens"]
    stem = list(range(20))
    engine.score(shots, [[*stem, 1], [*stem, 2, 3], [*stem, 4]])
    assert engine.stats()["prefill_tokens"] - before == 72 + 20 + 1


def test_logits_never_stand_whole(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    whole = Decoder.logits

    def counted(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return whole(self, hidden)

    ids = prompts(1, 250, 250)[0]
    expected = plain(decoder, ids[:1], ids[1:])
    monkeypatch.setattr(Decoder, "logits", counted)
    close(Engine(decoder, None).score(ids[:1], [ids[1:]])[0], expected)
    assert rows == [128, 121]


@needs_native
def test_the_native_step_s_scores() -> None:
    """It computes what is served: the very same numbers, whatever ran before and beside."""
    decoder = quantised(dataclasses.replace(CONFIG, max_pos=64))
    asked = [([n * k % 90 for n in range(33)], [[5, 6], [7]]) for k in (1, 2, 3)]
    found = []
    for most in (7, 32, 64):
        engine = Engine(decoder, None, page_tokens=16, pages=16, max_batch_tokens=most)
        assert engine.runner._native is not None
        found += [engine.score_many(asked), engine.score_many(asked[::-1])[::-1]]
        found += [[engine.score(*one) for one in asked]]
        vectors = engine.embed([ids for ids, _ in asked])
        with torch.inference_mode(), rounding(decoder):
            for vector, (ids, _) in zip(vectors, asked, strict=True):
                hidden = decoder(torch.tensor(ids), Packed([len(ids)])).mean(0)
                assert (torch.from_numpy(vector) - hidden).abs().mean() < 0.05 * hidden.std()
    assert all(one == found[0] for one in found)
    with rounding(decoder):
        twin = plain(decoder, asked[0][0], [5, 6])
    assert found[0][0][0].logprobs == pytest.approx(twin.logprobs, abs=0.1)
    said = engine.generate([Request(asked[0][0], Sampling(max_tokens=2))])[0].ids
    assert engine.score(asked[0][0], [said])[0].greedy


def test_the_context_is_used_to_its_end_and_no_further() -> None:
    decoder = tiny(max_pos=24)
    engine = Engine(decoder, None)
    ids = prompts(1, 20, 20)[0]
    close(engine.score(ids, [[1, 2, 3, 4, 5]])[0], plain(decoder, ids, [1, 2, 3, 4, 5]))
    with pytest.raises(CapacityError, match="a prompt of 25 tokens"):
        engine.score_many([(ids, [[1]]), (ids, [[1, 2, 3, 4, 5, 6]])])
    assert engine.stats()["steps"] == 1, "refused before anything is computed"


def test_what_cannot_be_scored(decoder: Decoder) -> None:
    engine = Engine(decoder, None)
    with pytest.raises(RequestError, match="continuation 1 of 2 is empty"):
        engine.score([1], [[2], []])
    with pytest.raises(RequestError, match=f"token id {VOCAB} is outside"):
        engine.score([1], [[VOCAB]])
    with pytest.raises(RequestError, match="an empty prompt"):
        engine.score([], [[1]])
    assert engine.score_many([]) == [] and engine.score([1], []) == []
    headless = Engine(Decoder(tiny().config, headless=True), None)
    with pytest.raises(FileError, match="no head"):
        headless.score([1], [[2]])


@torch.no_grad()
def test_logits_that_are_no_numbers_are_an_error() -> None:
    decoder = tiny()
    decoder.embed.weight[5] = float("nan")
    engine = Engine(decoder, None)
    with pytest.raises(ArithmeticError, match="not finite"):
        engine.score([5, 6], [[1]])
    assert not engine.busy


# --- embeddings ------------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_hidden_states(decoder: Decoder) -> None:
    asked = prompts(6, 1, 40, seed=3)
    with torch.inference_mode():
        expected = torch.stack(
            [decoder(torch.tensor(ids), Packed([len(ids)])).mean(0) for ids in asked]
        )
    for most in (1, 7, 512):
        engine = Engine(decoder, None, page_tokens=4, pages=40, max_batch_tokens=most)
        for _ in range(2):
            assert np.allclose(engine.embed(asked), expected, atol=1e-5)
        unit = engine.embed(asked, normalise=True)
        assert np.allclose(unit, torch.nn.functional.normalize(expected), atol=1e-5)
    assert engine.embed([]).shape == (0, 32)
    with pytest.raises(RequestError, match="an empty prompt"):
        engine.embed([[1], []])


def test_an_embedding_outlives_preemption(decoder: Decoder) -> None:
    """What was summed before the pages were taken away is not counted twice."""
    engine = Engine(decoder, None, page_tokens=4, pages=20, max_batch_tokens=4)
    ids = prompts(1, 40, 40, seed=9)[0]
    for n in range(3):
        engine.submit(Request(prompts(1, 8, 8, seed=n)[0], Sampling(max_tokens=30), id=str(n)))
    for _ in range(3):
        engine.step()
    engine.submit(Request(ids, embed=True, id="e"))
    found = None
    while engine.busy:
        for piece in engine.step():
            if piece.request_id == "e" and piece.reply is not None:
                assert isinstance(piece.reply.reading, Pooled)
                found = piece.reply.reading.mean
    assert engine.scheduler.preemptions > 0 and found is not None
    with torch.inference_mode():
        expected = decoder(torch.tensor(ids), Packed([len(ids)])).mean(0)
    assert np.allclose(found, expected, atol=1e-5)


def test_a_model_without_head_embeds() -> None:
    decoder = Decoder(tiny().config, headless=True)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.3)
        expected = decoder(torch.tensor([1, 2, 3]), Packed([3])).mean(0)
    assert np.allclose(Engine(decoder, None).embed([[1, 2, 3]])[0], expected, atol=1e-5)


def test_an_encoder_and_decoder_gives_no_embedding() -> None:
    source = json.loads((FIXTURES[0].parent / "t5.json").read_text())
    decoder = build(by_source(source, "fixture").config(source, "fixture"))
    with pytest.raises(RequestError, match="reads a prompt and its reply in different ways"):
        Engine(decoder, None).embed([[1, 2, 3]])
