"""Whatever the engine does to be faster, each reply is the one that its request alone would get.

Random schedules: requests come while others run, share beginnings, have too few pages, priorities,
drafts, adapters, grammars, stops and penalties; some are aborted, scores and embeddings run between
them. What "the same" means depends on how it is computed:

* the native step, whatever the cache keeps its numbers in: the same to the last bit, logprobs too;
* PyTorch in float64: the same tokens as computing everything anew for each one;
* PyTorch with a smaller cache, and adapters beside the native step: each greedy token is, up to the
  bound in `NEAR`, the likeliest after the tokens before it.

FUZZ_EXAMPLES=1000 tries so many schedules of each kind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herdbook.engine import compiled, store
from herdbook.engine.engine import Engine
from herdbook.engine.grammar import Grammar
from herdbook.engine.reading import Likelihoods, Pooled
from herdbook.engine.request import Logprob, Reply, Request, Sampling
from herdbook.model.decoder import Decoder
from herdbook.training import peft_format

from .conftest import naive, tiny
from .test_adapters import tune
from .test_engine import Letters, all_free
from .test_native import CONFIG, CONFIGS, needs_native, quantised
from .test_speculation import always, noisy

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "12"))
#: nats by which another way of rounding may miss: the cache's, and that of layers of 4 bits, which
#: PyTorch's kernel gives inputs in bfloat16
NEAR = {torch.float32: 0.1, torch.bfloat16: 0.4, torch.int8: 0.5}

schedules = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


class Words(Letters):
    """Letters of one byte, so that a grammar can be told in them."""

    special_ids = stop_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 33 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(33 + i) for i in ids)

    @property
    def codec(self) -> Words:
        return self

    def token_bytes(self, id: int) -> bytes:
        return self.decode([id]).encode("latin-1")

    def within(self, data: bytes) -> list[int]:
        return self.encode(data.decode("latin-1"))


# --- what may come -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A request, the step in which it comes, and the step in which it is aborted, if it is."""

    request: Request
    at: int
    abort: int | None


STEMS = ([], [1, 2, 3, 4] * 5, [1, 2, 3, 4] * 2 + [3, 1] * 6, [50, 2, 60, 3, 70, 1, 80, 2, 90, 4])
#: what the model says so is made of few letters: stops come, and guesses are right
FEW = {n: 12.0 for n in range(1, 4)}

lengths = st.sampled_from([30, 20, 9, 1])
steered = st.builds(
    Sampling,
    max_tokens=lengths,
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 3),
    logprobs=st.sampled_from([None, None, 0, 3]),
    prompt_logprobs=st.sampled_from([None, None, None, 2]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    logit_bias=st.sampled_from([(), FEW]),
    stop=st.sampled_from([(), (), (Words().decode([2, 1]), Words().decode([3, 3, 1]))]),
    stop_token_ids=st.sampled_from([(), (2,)]),
    ignore_eos=st.booleans(),
).flatmap(
    lambda s: st.builds(
        replace, st.just(s), min_tokens=st.sampled_from([0, 0, min(4, s.max_tokens)])
    )
)
plain = st.builds(
    Sampling,
    max_tokens=lengths,
    ignore_eos=st.just(True),
    logprobs=st.sampled_from([None, 2]),
    prompt_logprobs=st.sampled_from([None, 2]),
)
grammars = st.builds(
    Sampling,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.8]),
    grammar=st.sampled_from(
        [
            Grammar("regex", "[A-Z]{2,7}"),
            Grammar.choice([Words().decode([4, 5, 6, 4, 5, 6, 9]), Words().decode([4, 5, 7])]),
        ]
    ),
    logprobs=st.sampled_from([None, 1]),
)


@st.composite
def jobs(draw: st.DrawFn, samplings: st.SearchStrategy[Sampling]) -> list[Job]:
    crowd = draw(st.booleans())  # long replies that all come at once: pages run out
    found: list[Job] = []
    least = {"sampling": Sampling(max_tokens=1)}
    for number in range(draw(st.integers(3, 8))):
        ids = draw(st.sampled_from(STEMS)) + draw(
            st.lists(st.integers(0, 5), min_size=1, max_size=9)
        )
        kind = draw(st.sampled_from(["draw"] * 5 + ["score", "embed"]))
        sampling = draw(samplings)
        if crowd and sampling.grammar is None:
            sampling = replace(sampling, max_tokens=40, ignore_eos=True, stop=(), stop_token_ids=())
        asked: dict[str, Any] = {"sampling": sampling}
        if kind == "score":
            rows = draw(st.integers(1, min(4, len(ids))))
            asked = {**least, "targets": tuple((n, n + 1) for n in range(rows))}
        if kind == "embed":
            asked = {**least, "embed": True}
        asked["adapter"] = draw(st.sampled_from([None, None, None, "ann", "bob"]))
        asked["priority"] = draw(st.integers(-1, 1))
        at = 0 if crowd else draw(st.sampled_from([0, 0, 1, 2, 5, 20]))
        abort = draw(st.sampled_from([None] * 6 + [1, 9]))
        gone = None if abort is None else at + abort
        found.append(Job(Request(ids, id=str(number), **asked), at, gone))
    return found


def sizes(page_tokens: list[int]) -> st.SearchStrategy[dict[str, int]]:
    """What an engine has to do with; `spare`: pages besides those that the longest request needs."""
    return st.fixed_dictionaries(
        {
            "page_tokens": st.sampled_from(page_tokens),
            "spare": st.integers(0, 3),
            "max_batch_tokens": st.sampled_from([7, 24, 512, 3, 1]),
        }
    )


chances = st.tuples(st.sampled_from([0.5, 1.0]), st.integers(0, 9))


# --- running it --------------------------------------------------------------------------------------


def tight(decoder: Decoder, some: list[Job], size: dict[str, int], **settings: Any) -> Engine:
    size = dict(size)
    longest = max(len(job.request.ids) + job.request.sampling.max_tokens for job in some)
    pages = -(-longest // size["page_tokens"]) + size.pop("spare")
    return Engine(decoder, Words(), pages=pages, **size, **settings)  # type: ignore[arg-type]


@contextmanager
def adapted(engine: Engine, folder: Path) -> Iterator[Engine]:
    """With its adapters, which are taken off again: all are gone, whatever ran."""
    for name in ("ann", "bob"):
        engine.load_adapter(name, folder / name)
    yield engine
    for name in ("ann", "bob"):
        engine.unload_adapter(name)


def follow(engine: Engine, some: list[Job]) -> dict[str, Reply]:
    """Run a schedule. Pages are accounted for after each step, and pieces add up to their replies."""
    replies: dict[str, Reply] = {}
    said: dict[str, list[Any]] = {job.request.id: [[], "", []] for job in some}
    work = sum(len(job.request.ids) + job.request.sampling.max_tokens for job in some)
    step = 0
    while engine.busy or step <= max(job.at for job in some):
        for job in some:
            if job.at == step:
                engine.submit(job.request)
            if job.abort == step:
                engine.abort(job.request.id)
        for piece in engine.step():
            assert piece.request_id not in replies, "a piece after the last"
            ids, text, logprobs = said[piece.request_id]
            said[piece.request_id] = [
                [*ids, *piece.ids], text + piece.text, [*logprobs, *piece.logprobs]
            ]  # fmt: skip
            if piece.reply is not None:
                replies[piece.request_id] = piece.reply
        engine.pool.check()
        held = {page for one in engine._active.values() for page in one.pages}
        assert engine.pool.pages - engine.pool.free == len(held), "a leak"
        step += 1
        assert step < 20 * work, "it does not end"
    assert all_free(engine) and len(replies) == len(some)
    for id, (ids, text, logprobs) in said.items():
        assert (tuple(ids), text) == (replies[id].ids, replies[id].text)
        assert replies[id].logprobs in (None, tuple(logprobs))
    return replies


def alone(engine: Engine, request: Request) -> Reply:
    engine.forget()
    [reply] = engine.generate([request])
    return reply


def greedy(s: Sampling) -> bool:
    """Whether it is one of `plain`."""
    return s == Sampling(
        max_tokens=s.max_tokens,
        ignore_eos=True,
        logprobs=s.logprobs,
        prompt_logprobs=s.prompt_logprobs,
    )


def numbers(told: tuple[Logprob | None, ...] | None) -> list[float]:
    return [one.logprob for one in told or () if one is not None]


def same(got: Reply, want: Reply, exactly: bool) -> None:
    """An aborted one is the beginning of what it would have been."""
    assert got.error is None and want.error is None
    n, near = len(got.ids), 0.0 if exactly else 1e-5
    if got.finish == "abort":
        assert got.ids == want.ids[:n] and want.text.startswith(got.text)
    else:
        assert (got.ids, got.text, got.finish) == (want.ids, want.text, want.finish)
    assert numbers(got.logprobs) == pytest.approx(numbers(want.logprobs)[:n], abs=near)
    told = numbers(got.prompt_logprobs)
    expected = numbers(want.prompt_logprobs)
    assert told == pytest.approx(expected[: len(told)], abs=near)
    assert len(told) == len(expected) or not n
    if exactly:
        assert got.logprobs == (want.logprobs and want.logprobs[:n])
        if n and got.prompt_logprobs:
            assert got.prompt_logprobs == want.prompt_logprobs
    if got.finish == "abort":
        return
    if isinstance(got.reading, Likelihoods):
        assert isinstance(want.reading, Likelihoods) and got.reading.best == want.reading.best
        for mine, theirs in zip(got.reading.logprobs, want.reading.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=near)
    if isinstance(got.reading, Pooled):  # a sum in chunks, in float32
        assert isinstance(want.reading, Pooled)
        assert np.allclose(got.reading.mean, want.reading.mean, atol=1e-5)


def missed(got: Reply, request: Request, engine: Engine) -> float:
    """By how many nats greedy tokens miss the likeliest, and what was told of them the truth, which
    `engine` reads off the whole as a prompt."""
    ids = [*request.ids, *got.ids]
    forced = Sampling(max_tokens=1, prompt_logprobs=1)
    told = alone(engine, Request(ids, forced, adapter=request.adapter)).prompt_logprobs
    assert told is not None
    true = [one for one in told[len(request.ids) :] if one is not None]
    off = [one.top[0][1] - one.logprob for one in true]
    off += [abs(a - b.logprob) for a, b in zip(numbers(got.logprobs), true, strict=False)]
    return max(off, default=0.0)


# --- PyTorch -----------------------------------------------------------------------------------------

WINDOWS: dict[str, tuple[int | None, ...]] = {"all": (), "windows": (None, 5)}
EXACT = {name: tiny(windows=windows).double() for name, windows in WINDOWS.items()}
DRAFT = noisy(EXACT["all"], 0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters for the tiny decoder, and under native/ for that of the native step."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "native").mkdir()
    for seed, name in enumerate(("ann", "bob"), 1):
        tune(tiny(), folder / name, seed)
        tune(Decoder(CONFIG), folder / "native" / name, seed)
    return folder


@cache
def tuned(windows: str, folder: Path, name: str | None) -> Decoder:
    decoder = tiny(windows=WINDOWS[windows]).double()
    if name is not None:
        peft_format.load(decoder, folder / name)
    return decoder


def torch_engine(some: list[Job], windows: str, size: dict[str, int], **settings: Any) -> Engine:
    source = settings.pop("source")
    guess: dict[str, Any] = {"draft": DRAFT} if source == "draft" else {"speculate": source}
    return tight(EXACT[windows], some, size, **guess, **settings)


sources = st.sampled_from([None, "ngram", "draft"])


@schedules
@given(
    some=jobs(st.one_of(plain, steered, grammars)),
    windows=st.sampled_from(list(WINDOWS)),
    size=sizes([1, 3, 8, 16]),
    source=sources,
    chance=chances,
)
def test_pytorch_says_what_each_request_alone_would_hear(
    folder: Path,
    some: list[Job],
    windows: str,
    size: dict[str, int],
    source: str | None,
    chance: tuple[float, int],
) -> None:
    engine = torch_engine(some, windows, size, source=source)
    if source:
        always(engine, *chance)
    with adapted(engine, folder):
        replies = follow(engine, some)
    with adapted(Engine(EXACT[windows], Words()), folder) as one:  # type: ignore[arg-type]
        for job in some:
            request, reply = job.request, replies[job.request.id]
            same(reply, alone(one, request), exactly=False)
            if greedy(request.sampling):
                decoder = tuned(windows, folder, request.adapter)
                assert list(reply.ids) == naive(decoder, request.ids, len(reply.ids))


@schedules
@given(
    some=jobs(plain),
    windows=st.sampled_from(list(WINDOWS)),
    size=sizes([3, 16]),
    source=sources,
    chance=chances,
    dtype=st.sampled_from([torch.bfloat16, torch.int8]),
)
def test_pytorch_with_a_smaller_cache_stays_near(
    folder: Path,
    some: list[Job],
    windows: str,
    size: dict[str, int],
    source: str | None,
    chance: tuple[float, int],
    dtype: torch.dtype,
) -> None:
    engine = torch_engine(some, windows, size, source=source, cache_dtype=dtype)
    if source:
        always(engine, *chance)
    with adapted(engine, folder):
        replies = follow(engine, some)
    with adapted(Engine(EXACT[windows], Words()), folder) as one:  # type: ignore[arg-type]
        for job in some:
            assert missed(replies[job.request.id], job.request, one) <= NEAR[dtype]


# --- the native step ---------------------------------------------------------------------------------


@contextmanager
def compiled_for(processor: str) -> Iterator[None]:
    flags = [one for one in compiled.FLAGS if not one.startswith("-march")]
    compiled.library.cache_clear()
    with patch.object(compiled, "FLAGS", (*flags, f"-march={processor}")):
        yield
    compiled.library.cache_clear()


@cache
def kept(name: str, layers: int = 3) -> Decoder:
    windows = CONFIGS[name].windows[:layers]
    return quantised(replace(CONFIGS[name], layers=layers, windows=windows))


@needs_native
@pytest.mark.parametrize("processor", ["native", "haswell"])
@schedules
@given(
    some=jobs(st.one_of(plain, steered, grammars)),
    name=st.sampled_from(["llama", "window"]),
    size=sizes([16, 32]),
    source=st.sampled_from([None, "ngram", "itself", "smaller"]),
    chance=chances,
    dtype=st.sampled_from([*store.NATIVE]),
)
def test_the_native_step_says_the_same_to_the_last_bit(
    folder: Path,
    processor: str,
    some: list[Job],
    name: str,
    size: dict[str, int],
    source: str | None,
    chance: tuple[float, int],
    dtype: str,
) -> None:
    guess: dict[str, Any] = {"speculate": source}
    if source in ("itself", "smaller"):
        guess = {"draft": kept(name, 3 if source == "itself" else 1)}
    with compiled_for(processor):
        engine = tight(kept(name), some, size, cache_dtype=dtype, **guess)
        one = Engine(kept(name), Words(), cache_dtype=dtype)  # type: ignore[arg-type]
    assert engine.runner._native is not None and one.runner._native is not None
    if source:
        always(engine, *chance)
    with adapted(engine, folder / "native"), adapted(one, folder / "native"):
        replies = follow(engine, some)
        for job in some:
            request, reply = job.request, replies[job.request.id]
            if request.adapter is None:
                same(reply, alone(one, request), exactly=True)
            elif greedy(request.sampling):
                assert missed(reply, request, one) <= NEAR[getattr(torch, dtype)]
