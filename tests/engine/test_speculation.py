"""Drafts change how many steps a reply takes, and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence as Many

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.engine.engine import Engine
from herdbook.engine.request import Reply, Request, Sampling
from herdbook.engine.sampling import Chooser, candidates
from herdbook.engine.sequence import Sequence
from herdbook.engine.speculation import ROWS, Ask, Costs, DraftModel, Lookup, Trial
from herdbook.engine.text import TextOut
from herdbook.errors import ConfigError
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Packed

from .conftest import VOCAB, prompts, tiny
from .test_engine import Letters, all_free
from .test_native import CONFIG, needs_native, quantised


class Scripted:
    """Drafts that know the replies: right up to a place drawn at random, then wrong or at an end."""

    def __init__(self, replies: dict[tuple[int, ...], tuple[int, ...]], seed: int = 0) -> None:
        self.replies, self.random = replies, random.Random(seed)

    def guess(self, asked: Many[Ask]) -> list[list[int]]:
        guesses = []
        for ask in asked:
            one = ask.sequence
            reply = self.replies[tuple(one.ids[: one.prompt_tokens])]
            right = list(reply[one.reply_tokens :][: self.random.randint(0, ask.tokens)])
            wrong = self.random.randint(0, ask.tokens - len(right))
            guesses.append(right + [self.random.randrange(VOCAB) for _ in range(wrong)])
        return guesses

    def learn(self, trial: Trial) -> None: ...


def always(engine: Engine, chance: float = 1.0, seed: int = 0) -> Engine:
    """Drafts are tried with this chance, whatever they cost."""
    assert engine.speculation is not None
    dice = random.Random(seed)
    engine.speculation.pays = lambda rate, rows: dice.random() < chance  # type: ignore[method-assign]
    return engine


def noisy(decoder: Decoder, noise: float) -> Decoder:
    """A draft model that is often right."""
    draft = tiny().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one, of in zip(draft.parameters(), decoder.parameters(), strict=True):
            one.copy_(of + noise * torch.randn(of.shape, generator=generator, dtype=of.dtype))
    return draft


def fresh(requests: Many[Request]) -> list[Request]:
    return [Request(one.ids, one.sampling, stop=one.stop) for one in requests]


def said(replies: Many[Reply]) -> list[tuple[tuple[int, ...], str, str]]:
    return [(reply.ids, reply.text, reply.finish) for reply in replies]


#: in float64 the rounding of wider products is too small to tip a token
DECODER = tiny().double()
DRAFTS = {noise: noisy(DECODER, noise) for noise in (0.0, 0.02)}

sampled = st.builds(
    Sampling,
    max_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 5),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)
asked = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=24), sampled),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(
    asked=asked,
    source=st.sampled_from(["ngram", 0.0, 0.02, "script"]),
    page_tokens=st.sampled_from([1, 3, 8, 16]),
    spare=st.integers(0, 40),
    max_batch_tokens=st.sampled_from([2, 5, 17, 512]),
    chance=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_replies_are_those_without_drafts(
    asked: list[tuple[list[int], Sampling]],
    source: str | float,
    page_tokens: int,
    spare: int,
    max_batch_tokens: int,
    chance: float,
    seed: int,
) -> None:
    """Greedy and sampled, under preemption, in chunks, with prefix hits, aborts in between."""
    requests = [Request(ids, sampling) for ids, sampling in asked]
    want = said(Engine(DECODER, None).generate(requests))
    longest = max(len(ids) + sampling.max_tokens for ids, sampling in asked)
    engine = Engine(
        DECODER,
        None,
        page_tokens=page_tokens,
        pages=-(-longest // page_tokens) + spare // page_tokens,
        max_batch_tokens=max_batch_tokens,
        draft=DRAFTS[source] if isinstance(source, float) else None,
        speculate=None if isinstance(source, float) else "ngram",
    )
    always(engine, chance, seed)
    if source == "script":
        known = {tuple(ids): want[i][0] for i, (ids, _) in enumerate(asked)}
        engine.speculation.source = Scripted(known, seed)  # type: ignore[union-attr]
    assert said(engine.generate(fresh(requests))) == want
    assert all_free(engine)
    # the pages that are known now hold what they say: a longer conversation goes on from them
    longer = [
        Request([*ids, *reply[0], 1], sampling)
        for (ids, sampling), reply in zip(asked, want, strict=True)
        if len(ids) + len(reply[0]) + 1 + sampling.max_tokens <= engine.most_tokens
    ]
    if source != "script":
        again = engine.generate(fresh(longer))
        assert said(again) == said(Engine(DECODER, None).generate(fresh(longer)))
    # one is aborted on its way
    requests = fresh(requests)
    for request in requests:
        engine.submit(request)
    gone, step, last = requests[seed % len(requests)].id, 0, {}
    while engine.busy:
        last |= {piece.request_id: piece.reply for piece in engine.step() if piece.reply}
        step += 1
        if step == seed:
            engine.abort(gone)
    for request, (ids, _, _) in zip(requests, want, strict=True):
        got = last[request.id]
        assert got is not None
        assert got.ids == ids or (got.finish == "abort" and got.ids == ids[: len(got.ids)])
    assert all_free(engine)


@needs_native
def test_the_native_step_says_the_same() -> None:
    """Its rows do not depend on how many there are: to the last bit."""
    decoder = quantised(CONFIG)
    asked = [
        Request([1 + n, 2, 3, 1 + n, 2], Sampling(max_tokens=60, temperature=n % 2 / 2, seed=n))
        for n in range(4)
    ]
    want = said(Engine(decoder, None).generate(asked))
    known = {tuple(one.ids): ids for one, (ids, _, _) in zip(asked, want, strict=True)}
    engine = always(Engine(decoder, None, speculate="ngram"))
    engine.speculation.source = Scripted(known)  # type: ignore[union-attr]
    assert said(engine.generate(fresh(asked))) == want
    assert engine.stats()["accepted_tokens"] > 40


def test_drafts_save_steps() -> None:
    """Scripted drafts that are all right: 1 + 15 tokens a step."""
    ids = prompts(1, 10, 10)[0]
    request = Request(ids, Sampling(max_tokens=65))
    (reply,) = Engine(DECODER, None).generate([request])
    engine = always(Engine(DECODER, None, speculate="ngram"))
    script = Scripted({tuple(ids): reply.ids})
    script.random.randint = lambda low, high: high  # type: ignore[method-assign]
    engine.speculation.source = script  # type: ignore[union-attr]
    pieces = list(engine.stream(fresh([request])[0]))
    assert [piece.ids for piece in pieces] == [(id,) for id in reply.ids]
    stats = engine.stats()
    # the prompt; then 4, 8 and 15 drafts at a time
    assert stats["steps"] == 1 + 1 + 1 + 3 + 1 and stats["acceptance_rate"] == 1.0
    assert stats["decode_tokens"] == 64 and stats["completion_tokens"] == 65
    assert stats["drafted_tokens"] == stats["accepted_tokens"] == 64 - 6


def test_ends_inside_accepted_drafts() -> None:
    """A stop token, a stop string and the length, each in the middle of what was guessed right."""
    ids = prompts(1, 10, 10, seed=9)[0]
    (reply,) = Engine(DECODER, None).generate([Request(ids, Sampling(max_tokens=40))])
    text = Letters().decode(list(reply.ids))
    for stop_id, stop, most in ((reply.ids[7], (), 40), (0, (text[6:9],), 40), (0, (), 8)):
        tokenizer = Letters()
        tokenizer.stop_ids = frozenset({stop_id})
        request = Request(ids, Sampling(max_tokens=most, stop=stop))
        want = Engine(DECODER, tokenizer).generate([request])  # type: ignore[arg-type]
        engine = always(Engine(DECODER, tokenizer, page_tokens=4, speculate="ngram"))  # type: ignore[arg-type]
        script = Scripted({tuple(ids): reply.ids})
        script.random.randint = lambda low, high: high  # type: ignore[method-assign]
        engine.speculation.source = script  # type: ignore[union-attr]
        pieces = list(engine.stream(fresh([request])[0]))
        assert said([pieces[-1].reply]) == said(want)  # type: ignore[list-item]
        assert "".join(piece.text for piece in pieces) == want[0].text
        assert engine.stats()["accepted_tokens"] > 0 and all_free(engine)


def test_a_failing_step_takes_the_drafts_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = always(Engine(DECODER, None, speculate="ngram"))
    engine.submit(Request([1, 2, 3, 1, 2], Sampling(max_tokens=20, ignore_eos=True), id="one"))
    engine.step()
    before = list(engine._active["one"].ids)
    source = Scripted({(1, 2, 3, 1, 2): tuple(range(20))})
    source.random.randint = lambda low, high: high  # type: ignore[method-assign]
    engine.speculation.source = source  # type: ignore[union-attr]

    def no_memory(batch: Many[Sequence]) -> torch.Tensor:
        assert len(batch[0].drafts) == 4 and batch[0].wanted == 5
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", no_memory)
        with pytest.raises(RuntimeError, match="no memory"):
            engine.step()
    assert engine._active["one"].ids == before
    (reply,) = Engine(DECODER, None).generate([Request([1, 2, 3, 1, 2], Sampling(max_tokens=20))])
    while engine.busy:
        last = engine.step()[-1]
    assert last.reply is not None and last.reply.ids == reply.ids


# --- the distribution --------------------------------------------------------------------------------


def chi_square(seen: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How far off, in standard deviations of the chi-square statistic (df, variance 2 df)."""
    n = sum(seen.values())
    assert set(seen) <= set(expected) and abs(sum(expected.values()) - 1) < 1e-3
    statistic = sum((seen[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    df = len(expected) - 1
    return float((statistic - df) / (2 * df) ** 0.5)


@torch.inference_mode()
def exactly(ids: list[int], sampling: Sampling, tokens: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation."""
    runs: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(tokens):
        longer = {}
        for run, p in runs.items():
            row = torch.tensor([*ids, *run])
            logits = DECODER.logits(DECODER(row, Packed([len(row)]))[-1:])[0]
            chooser = Chooser(sampling, ids, VOCAB)
            for id in run:
                chooser.took(id)
            kept, which = candidates(chooser.penalise(logits.numpy()), sampling)
            assert which is not None
            for id, q in zip(which.tolist(), (kept / kept.sum()).tolist(), strict=True):
                longer[(*run, id)] = p * q
        runs = longer
    return runs


@pytest.mark.parametrize("source", ["ngram", "draft"])
def test_the_distribution_is_the_models(source: str) -> None:
    """Three tokens of 800 replies, against every continuation's probability."""
    ids = [5, 6, 7, 5, 6, 7, 5, 6]
    sampling = Sampling(max_tokens=4, temperature=3.0, top_k=3, frequency_penalty=0.5)
    expected = exactly(ids, sampling, 3)
    if source == "draft":
        engine = Engine(DECODER, None, draft=DRAFTS[0.02])
    else:
        engine = Engine(DECODER, None, speculate="ngram")
        likely = sorted(expected, key=lambda run: -expected[run])[
            4
        ]  # a guess without probabilities
        engine.speculation.source = Scripted({tuple(ids): (*likely, 0)})  # type: ignore[union-attr]
    always(engine)
    seen: Counter[tuple[int, ...]] = Counter()
    for start in range(0, 800, 4):
        some = [
            Request(ids, Sampling(**vars(sampling) | {"seed": seed}))
            for seed in range(start, start + 4)
        ]
        seen.update(reply.ids[:3] for reply in engine.generate(some))
    assert len(expected) == 27 and abs(chi_square(seen, expected)) < 3.5
    stats = engine.stats()
    assert 0.03 < stats["acceptance_rate"] < 0.95 and stats["drafted_tokens"] > 800


def draws(p: torch.Tensor, q: torch.Tensor, seeds: int) -> Counter[tuple[int, int]]:
    """(the target's token, the draft's) for logits log p and log q."""
    pairs: Counter[tuple[int, int]] = Counter()
    for seed in range(seeds):
        chooser = Chooser(Sampling(temperature=1.0, seed=seed), [0], len(p))
        draft = chooser.fork().choose(q.log().numpy())
        pairs[chooser.choose(p.log().numpy()), draft] += 1
    return pairs


def test_the_rule_in_closed_form() -> None:
    """Toy distributions: what comes is p, and agrees with the draft as often as theory says."""
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.25, 0.25, 0.3, 0.2])
    n = 6000
    pairs = draws(p, q, n)
    for side, of in ((0, p), (1, q)):
        seen: Counter[tuple[int, ...]] = Counter()
        for pair, count in pairs.items():
            seen[(pair[side],)] += count
        assert abs(chi_square(seen, {(i,): float(x) for i, x in enumerate(of)})) < 3.5
    # the winner of both races is i with probability 1 / sum_j max(p_j / p_i, q_j / q_i)
    agree = sum(float(1 / torch.maximum(p / p[i], q / q[i]).sum()) for i in range(4))
    share = sum(count for (a, b), count in pairs.items() if a == b) / n
    assert abs(share - agree) < 4 * (agree * (1 - agree) / n) ** 0.5
    apart = float((p - q).abs().sum() / 2)
    assert (1 - apart) / (1 + apart) <= agree <= 1 - apart
    # a guess x without probabilities: accepted with p(x), else p without x, renormalised
    x, others = 1, Counter({(a,): 0 for a in (0, 2, 3)})
    for (a, _), count in pairs.items():
        if a != x:
            others[(a,)] += count
    rest = {(i,): float(p[i] / (1 - p[x])) for i in (0, 2, 3)}
    accepted = 1 - sum(others.values()) / n
    assert abs(accepted - float(p[x])) < 4 * (0.3 * 0.7 / n) ** 0.5
    assert abs(chi_square(others, rest)) < 3.5


# --- where drafts come from --------------------------------------------------------------------------


def sequence(ids: list[int], limit: int = 100) -> Sequence:
    request = Request(ids, Sampling(max_tokens=limit))
    return Sequence(request, limit, Chooser(request.sampling, ids, VOCAB), TextOut(None, ()))


def test_lookup() -> None:
    lookup = Lookup()

    def guess(one: Sequence, tokens: int) -> list[int]:
        return lookup.guess([Ask(one, tokens)])[0]

    assert guess(sequence([1]), 4) == guess(sequence([1, 2, 3, 4]), 4) == []
    one = sequence([1, 2, 3, 4, 5, 6, 9, 3, 4, 7, 1, 2])
    assert guess(one, 3) == [3, 4, 5]
    one.append(3)
    one.append(4)
    assert guess(one, 2) == [5, 6]  # the longer run [1, 2, 3, 4] before the later [3, 4]
    one.append(9)
    assert guess(one, 2) == []
    one.append(3)
    assert guess(one, 3) == [4, 7, 1]
    assert guess(sequence([8, 1, 2, 1, 2]), 5) == [1, 2, 1, 2, 1]  # goes round
    assert guess(sequence([7, 7, 7]), 3) == [7, 7, 7]


@pytest.mark.parametrize("page_tokens", [3, 16])
def test_a_draft_model_keeps_its_own_cache_right(page_tokens: int) -> None:
    """The model drafts for itself, so every draft is right but those that were spoilt on the way:
    after rejections, prefix hits and preemptions, too."""
    engine = Engine(DECODER, None, page_tokens=page_tokens, pages=90 // page_tokens, draft=DECODER)
    always(engine, 0.7)
    assert engine.speculation is not None
    source, dice = engine.speculation.source, random.Random(3)
    assert isinstance(source, DraftModel)
    guess, learn, spoilt = source.guess, source.learn, dict[int, int]()

    def spoil(asked: Many[Ask]) -> list[list[int]]:
        guesses = guess(asked)
        for ask, drafts in zip(asked, guesses, strict=True):
            at = dice.randrange(ROWS)
            if at < len(drafts):
                drafts[at] = (drafts[at] + 1) % VOCAB
            spoilt[id(ask.sequence)] = at
        return guesses

    def check(trial: Trial) -> None:
        learn(trial)
        if trial.drafts and trial.sequence.finish is None:
            assert trial.accepted == min(len(trial.drafts), spoilt[id(trial.sequence)])
            tried.append(trial.accepted)

    tried: list[int] = []
    source.guess, source.learn = spoil, check  # type: ignore[method-assign]
    shared = prompts(1, 20, 20, seed=3)[0]
    requests = [Request(shared + more, Sampling(max_tokens=30)) for more in prompts(4, 1, 9)]
    want = said(Engine(DECODER, None).generate(fresh(requests)))
    assert said(engine.generate(fresh(requests))) == want
    stats = engine.stats()
    assert stats["preemptions"] > 0 and stats["cached_tokens"] > 0
    engine.forget()
    assert said(engine.generate(fresh(requests))) == want
    assert len(tried) > 10 and stats["accepted_tokens"] > 20


def test_a_draft_model_reads_a_shared_prefix_once() -> None:
    engine = always(Engine(DECODER, None, page_tokens=4, draft=DRAFTS[0.02]))
    assert engine.speculation is not None
    source = engine.speculation.source
    assert isinstance(source, DraftModel)
    run, rows = source.runner.run, []

    def count(batch: Many[Sequence]) -> torch.Tensor | None:
        rows.append(sum(one.scheduled for one in batch))
        return run(batch)

    source.runner.run = count  # type: ignore[method-assign]
    ids = prompts(1, 40, 40)[0]
    for more in (1, 2):
        engine.generate([Request([*ids, more], Sampling(max_tokens=8))])
    assert max(rows) == rows[0] == 42 and rows.count(42) == 1


# --- where drafts do not pay -------------------------------------------------------------------------


def test_break_even() -> None:
    costs = Costs()
    assert costs.break_even(1) == 0.0
    for rows in (1, 5, 2, 9, 1):
        costs.add(rows, 0.010 + 0.001 * rows)
    assert costs.break_even(1) == pytest.approx(1 / 11)
    assert costs.break_even(8) == pytest.approx(8 / 18)
    costs.drafted(4, 0.012)
    assert costs.break_even(1) == pytest.approx(4 / 11)
    assert costs.break_even(8) > 1  # no rate reaches it
    flat = Costs()
    for rows in (1, 4, 8):
        flat.add(rows, 0.01 / rows)  # never less than nothing
    assert flat.break_even(1) == 0.0


def test_what_is_never_right_is_seldom_tried() -> None:
    engine = Engine(DECODER, None, speculate="ngram")
    assert engine.speculation is not None
    engine.speculation.costs.add = lambda rows, seconds: None  # type: ignore[method-assign]
    engine.speculation.costs.break_even = lambda rows: 0.3  # type: ignore[method-assign]
    ids = prompts(1, 10, 10)[0]
    request = Request(ids, Sampling(max_tokens=200))
    (reply,) = Engine(DECODER, None).generate([request])
    wrong = tuple((id + 1) % VOCAB for id in reply.ids)
    script = Scripted({tuple(ids): wrong})
    script.random.randint = lambda low, high: high  # type: ignore[method-assign]
    engine.speculation.source = script
    assert engine.generate(fresh([request]))[0].ids == reply.ids
    # some at once, then two drafts in every sixteenth step
    assert 20 <= engine.stats()["drafted_tokens"] <= 40
    assert engine.stats()["acceptance_rate"] == 0.0


def test_a_wide_batch_has_no_drafts() -> None:
    engine = always(Engine(DECODER, None, speculate="ngram"))
    same = [7] * 20 + [8] * 20
    many = [Request(same[i:], Sampling(max_tokens=3)) for i in range(ROWS // 2 + 1)]
    engine.speculation.source = Scripted(  # type: ignore[union-attr]
        {tuple(one.ids): (7, 7, 7) for one in many}
    )
    engine.generate(many)
    assert engine.stats()["drafted_tokens"] == 0
    engine.generate(fresh(many[1:]))
    assert engine.stats()["drafted_tokens"] > 0


def test_what_cannot_be() -> None:
    def refused(pattern: str, decoder: Decoder = DECODER, **settings: object) -> None:
        with pytest.raises(ConfigError, match=pattern):
            Engine(decoder, None, **settings)  # type: ignore[arg-type]

    refused("two sources", speculate="ngram", draft=DECODER)
    refused("speculate='eagle' is not known", speculate="eagle")
    other = DecoderConfig(**vars(DECODER.config) | {"vocab": 50})
    refused(f"of 50 tokens has another vocabulary than .* {VOCAB}", draft=Decoder(other))

    class State(Decoder):
        memory = "state"

    state = State(DECODER.config)
    refused("keeps a state", state, speculate="ngram")
    refused("draft works only", draft=state)
