"""The Triton kernel against PyTorch, in Triton's interpreter: `make triton`. On a GPU: test_cuda.py."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch

from herdbook.engine.engine import Engine

from .conftest import naive, prompts, tiny
from .on_tiles import (
    FIXTURES,
    LOOKS,
    NEAR,
    asked_of,
    greedy,
    of_fixture,
    on_tiles,
    plain,
    random_decoder,
)
from .on_tiles import differ as kernels_differ

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off: make triton", allow_module_level=True)
pytest.importorskip("triton")

from herdbook.engine.triton_attention import look as kernel

F32, BF16 = NEAR
differ = partial(kernels_differ, kernel)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("splits", [1, 3])
def test_ways_to_look(look: dict[str, Any], dtype: torch.dtype, splits: int) -> None:
    assert differ(look, dtype, splits=splits) < NEAR[dtype]


@pytest.mark.parametrize("cache_dtype", [F32, BF16, torch.int8])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_numbers_and_orders_of_the_cache(
    cache_dtype: torch.dtype, first: bool, dtype: torch.dtype
) -> None:
    assert differ({}, dtype, cache_dtype, first=first, splits=2) < NEAR[dtype]


@pytest.mark.parametrize(
    "sizes",
    [
        {"page_tokens": 1},
        {"page_tokens": 16},
        {"heads": 3, "kv_heads": 1},
        {"heads": 4, "kv_heads": 4, "head_dim": 80},
        {"heads": 7, "kv_heads": 1, "head_dim": 128},
        {"heads": 2, "kv_heads": 1, "head_dim": 256},
    ],
    ids=str,
)
def test_sizes(sizes: dict[str, int]) -> None:
    assert differ({}, **sizes, splits=2) < NEAR[F32]
    assert differ({"window": 9}, BF16, **sizes) < NEAR[BF16]


def test_the_engine_draws_the_same_tokens() -> None:
    decoder = tiny(windows=(None, 9))
    asked = prompts(5, 3, 40)
    engine = on_tiles(Engine(decoder, None, pages=60, max_batch_tokens=24), kernel)
    for ids, reply in zip(asked, greedy(engine, asked, 6), strict=True):
        assert list(reply) == naive(decoder, ids, 6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "falcon-rw", "chatglm", "opt", "glm"])
def test_families(name: str) -> None:
    """One for each axis that attention has."""
    [path] = [path for path in FIXTURES if path.stem == name]
    decoder = random_decoder(of_fixture(path))
    engine = on_tiles(Engine(decoder, None, page_tokens=4, pages=64, max_batch_tokens=16), kernel)
    asked = asked_of(decoder.config)[1:3]
    assert greedy(engine, asked, 4) == [plain(decoder, ids, 4) for ids in asked]
