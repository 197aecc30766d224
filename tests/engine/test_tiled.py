"""The layout of a GPU and its recorded steps, as far as they run anywhere, against a plain pass.

The kernel is written out in PyTorch here; Triton's is test_triton.py's part, a GPU test_cuda.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from torch import Tensor

from herdbook.engine import tiled
from herdbook.engine.cache import Cache
from herdbook.engine.engine import Engine
from herdbook.engine.graphs import SIZES, Graphs, Step, recordable
from herdbook.engine.request import Request, Sampling
from herdbook.model.decoder import Decoder

from .conftest import VOCAB, naive, prompts, tiny
from .on_tiles import (
    FIXTURES,
    asked_of,
    greedy,
    of_fixture,
    on_tiles,
    plain,
    random_decoder,
    written_out,
)


def replays(engine: Engine) -> int:
    """How many steps were recorded, of whatever size."""
    assert engine.runner.plain.graphs is not None
    return len(engine.runner.plain.graphs._steps)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_family(path: Path) -> None:
    """Chunks, batches and decoding steps: the greedy tokens of a plain pass, on every set of axes."""
    decoder = random_decoder(of_fixture(path))
    if decoder.memory != "pages":
        pytest.skip("keeps a state of its own instead of pages")
    engine = on_tiles(Engine(decoder, None, page_tokens=4, pages=64, max_batch_tokens=16))
    asked = asked_of(decoder.config)
    assert greedy(engine, asked) == [plain(decoder, ids) for ids in asked]
    if recordable(decoder):
        assert replays(engine) >= 2


@pytest.mark.parametrize("page_tokens", [1, 4, 16])
@pytest.mark.parametrize("max_batch_tokens", [1, 7, 512])
@pytest.mark.parametrize("windows", [(), (3, None), (None, 20)])
def test_equals_naive_under_batching_and_chunks(
    page_tokens: int, max_batch_tokens: int, windows: tuple[int | None, ...]
) -> None:
    decoder = tiny(windows=windows)
    engine = on_tiles(
        Engine(
            decoder,
            None,
            page_tokens=page_tokens,
            pages=600 // page_tokens,
            max_batch_tokens=max_batch_tokens,
        )
    )
    asked = prompts(6) + prompts(2, 30, 60, seed=1)
    for ids, reply in zip(asked, greedy(engine, asked, 12), strict=True):
        assert list(reply) == naive(decoder, ids, 12)


def test_sequences_come_and_go(decoder: Decoder) -> None:
    """Sizes change, rows are taken by others, pages run out and are had again by another owner."""
    engine = on_tiles(Engine(decoder, None, page_tokens=4, pages=24, max_batch_tokens=32))
    asked = prompts(9, 5, 30, seed=8)
    requests = [Request(ids, Sampling(max_tokens=3 + 4 * n)) for n, ids in enumerate(asked)]
    replies = engine.generate(requests)
    assert engine.stats()["preemptions"] > 0 and replays(engine) >= 3
    for n, (ids, reply) in enumerate(zip(asked, replies, strict=True)):
        assert list(reply.ids) == naive(decoder, ids, 3 + 4 * n)


def decoding(engine: Engine, asked: list[list[int]]) -> list:  # type: ignore[type-arg]
    """The sequences of a step in which each of the requests decodes its second token."""
    for ids in asked:
        engine.submit(Request(ids, Sampling(max_tokens=8, ignore_eos=True)))
    engine.step()
    return engine.scheduler.schedule()


@torch.inference_mode()
def test_free_rows_touch_nothing_but_the_last_page(decoder: Decoder) -> None:
    engine = on_tiles(Engine(decoder, None, page_tokens=4, pages=40, max_batch_tokens=512))
    batch = decoding(engine, prompts(3, 3, 9))
    cache, graphs = engine.runner.plain.cache, engine.runner.plain.graphs
    assert graphs is not None and graphs.serves(batch) and len(batch) == 3
    before = [one.clone() for one in (*cache.keys, *cache.values)]
    logits = graphs.run(batch)
    after = [one.clone() for one in (*cache.keys, *cache.values)]
    mine = {(one.pages[one.computed // 4], one.computed % 4) for one in batch}
    for old, new in zip(before, after, strict=True):
        changed = (old != new).flatten(2).any(-1).nonzero().tolist()
        assert {tuple(one) for one in changed} == mine | {(40, 0)}
    engine.runner.plain.graphs = None  # the ordinary step gives the same, into the same places
    assert np.allclose(engine.runner.run(batch), logits, atol=1e-5)
    for new, one in zip(after, (*cache.keys, *cache.values), strict=True):
        assert torch.allclose(new, one, atol=1e-5)


def test_what_is_not_served(decoder: Decoder) -> None:
    engine = on_tiles(Engine(decoder, None, page_tokens=4, pages=400, max_batch_tokens=512))
    graphs = engine.runner.plain.graphs
    assert graphs is not None
    batch = decoding(engine, prompts(SIZES[-1] + 1, 2, 3))
    assert not graphs.serves(batch) and graphs.serves(batch[:-1])
    batch[0].try_out([3])
    assert not graphs.serves(batch[:2]), "drafts are checked, several tokens of a sequence"
    engine = on_tiles(Engine(decoder, None, page_tokens=4, pages=40, max_batch_tokens=512))
    engine.submit(Request([5, 6, 7]))
    assert not graphs.serves(engine.scheduler.schedule()), "a prompt"


def test_likelihoods_of_prompts_and_drafts_beside(decoder: Decoder) -> None:
    """What is read or guessed goes the ordinary way, between recorded steps."""
    plainly = Engine(decoder, None, page_tokens=4, pages=100)
    tiles = on_tiles(Engine(decoder, None, page_tokens=4, pages=100))
    sampling = Sampling(max_tokens=8, prompt_logprobs=2, logprobs=1, ignore_eos=True)
    asked = [Request(ids, sampling) for ids in prompts(3, 4, 20)]
    both = [engine.generate(asked) for engine in (plainly, tiles)]
    for one, other in zip(*both, strict=True):
        assert one.ids == other.ids
        for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert replays(tiles), "once the prompt is read"
    guessing = on_tiles(Engine(decoder, None, page_tokens=4, pages=100, speculate="ngram"))
    ids = prompts(1, 6, 6)[0] * 4
    assert greedy(guessing, [ids], 20) == [plain(decoder, ids, 20)]


def test_without_triton_it_says_so_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    tiled.kernel_for.cache_clear()
    with patch.dict("sys.modules", {"triton": None}):
        assert tiled.kernel_for("cuda") is None and tiled.kernel_for("cuda") is None
    assert len(caplog.records) == 1 and "no Triton" in caplog.text
    assert tiled.kernel_for("cpu") is None
    tiled.kernel_for.cache_clear()


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
@torch.inference_mode()
def test_a_recorded_step_looks_at_no_value_and_stays_on_its_device(path: Path) -> None:
    """As on a GPU: tensors without numbers, on a device that no other may be mixed with."""
    decoder = random_decoder(of_fixture(path))
    if not recordable(decoder):
        pytest.skip("its steps cannot be recorded")
    cache = Cache(decoder.to("meta"), 64, 4)
    assert Step(decoder, cache, written_out, 4).compute().shape == (4, decoder.config.vocab)
    made, from_host = torch.tensor, set()

    def tensor(*what: Any, **how: Any) -> Tensor:
        from_host.add(how.get("device"))
        return made(*what, **how)

    step = Step(decoder, cache, lambda q, *_: None, 4)
    with patch("torch.tensor", tensor):
        step.compute()
    assert from_host <= {"cpu"}, "a number of the host that a recorded step would copy"


@pytest.mark.parametrize("fails", [False, True])
@torch.inference_mode()
def test_recording(decoder: Decoder, fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Twice computed, then recorded; where that fails, it is said and the step is computed each time."""
    engine = on_tiles(Engine(decoder, None, page_tokens=4, pages=40))
    batch = decoding(engine, prompts(2, 3, 9))
    graph, capture = MagicMock(), MagicMock()
    if fails:
        capture.return_value.__exit__.side_effect = RuntimeError("operation not permitted")
    with patch.multiple(
        "torch.cuda",
        CUDAGraph=lambda: graph,
        graph=capture,
        Stream=MagicMock(),
        stream=MagicMock(),
        current_stream=MagicMock(),
        graph_pool_handle=MagicMock(),
    ):
        graphs = Graphs(decoder, Cache(decoder, 41, 4), written_out)
        with patch.object(Step, "compute", autospec=True, side_effect=Step.compute) as computed:
            logits = [graphs.run(batch) for _ in range(3)]
    assert torch.allclose(logits[0], logits[2]) and logits[0].shape == (2, VOCAB)
    assert graph.replay.call_count == (0 if fails else 3)
    assert computed.call_count == 2 + 1 + (3 if fails else 0)
    assert ("without a CUDA graph" in caplog.text) == fails
