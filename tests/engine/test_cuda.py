"""On a GPU: the tokens that the CPU draws, by the kernel and by recorded steps (`make gpu`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import herdbook
from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling

from .conftest import naive, prompts, tiny
from .on_tiles import (
    FIXTURES,
    LOOKS,
    NEAR,
    asked_of,
    differ,
    greedy,
    of_fixture,
    plain,
    random_decoder,
)

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

F32, BF16 = NEAR


@pytest.fixture(scope="module")
def difference() -> Any:
    pytest.importorskip("triton")
    from herdbook.engine.triton_attention import look

    return partial(differ, look, device="cuda")


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("splits", [1, 3])
def test_the_kernel(difference: Any, look: dict[str, Any], dtype: torch.dtype, splits: int) -> None:
    assert difference(look, dtype, splits=splits) < NEAR[dtype]


@pytest.mark.parametrize("cache_dtype", [F32, BF16, torch.int8])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_numbers_and_sizes(
    difference: Any, cache_dtype: torch.dtype, head_dim: int, dtype: torch.dtype
) -> None:
    for kv_heads in (1, 4):
        sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "page_tokens": 16}
        assert difference({}, dtype, cache_dtype, splits=2, **sizes) < NEAR[dtype]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_family_draws_the_tokens_of_the_cpu(path: Path) -> None:
    decoder = random_decoder(of_fixture(path))
    asked = asked_of(decoder.config)
    expected = [plain(decoder, ids) for ids in asked]
    decoder.to("cuda")
    engine = Engine(decoder, None, page_tokens=4, pages=64, max_batch_tokens=16)
    assert greedy(engine, asked) == expected
    assert greedy(engine, asked) == expected, "out of the cache, and by what was recorded"


def test_steps_are_recorded_and_come_and_go() -> None:
    pytest.importorskip("triton")
    asked = prompts(20, 5, 60, seed=8)
    expected = [naive(tiny(windows=(None, 9)), ids, 3 + n) for n, ids in enumerate(asked)]
    engine = Engine(tiny(windows=(None, 9)).to("cuda"), None, pages=60, max_batch_tokens=64)
    replies = engine.generate(
        [Request(ids, Sampling(max_tokens=3 + n)) for n, ids in enumerate(asked)]
    )
    assert [list(reply.ids) for reply in replies] == expected
    assert engine.runner.plain.graphs is not None
    steps = engine.runner.plain.graphs._steps
    assert len(steps) > 2 and all(replay != step.compute for step, replay in steps.values())


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_smaller_caches_answer(cache_dtype: torch.dtype) -> None:
    """As the CPU does with such a cache, or, where roundings meet, as without."""
    asked = prompts(4, 5, 40)
    both = [
        greedy(Engine(tiny().to(device), None, pages=60, cache_dtype=cache_dtype), asked, 1)
        for device in ("cpu", "cuda")
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize("quantised", [False, True])
def test_a_real_model(smollm2_path: Path, quantised: bool) -> None:
    """Dense, and in 4 bits that are dequantised for each product, against the CPU's dense."""
    asked = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]
    here = herdbook.load(smollm2_path, device="cpu", dtype="float32", quantised=False)
    there = herdbook.load(smollm2_path, dtype="float32", quantised=quantised)
    assert there.decoder.device.type == "cuda", "by default"
    assert there.generate(asked, max_tokens=32) == here.generate(asked, max_tokens=32)
    ids = here.tokenizer.encode(asked[0])
    assert torch.allclose(there.logits(ids).cpu(), here.logits(ids), atol=2e-3)
    half = herdbook.load(smollm2_path, dtype="bfloat16", quantised=quantised)
    assert half.generate(asked[0], max_tokens=8).startswith(" Paris")
