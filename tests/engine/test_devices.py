"""Where a model is computed: what is chosen, what is refused, and what a GPU's memory allows."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import herdbook
from herdbook.engine.engine import Engine
from herdbook.engine.store import cache_kind, cache_pages, token_bytes
from herdbook.errors import CapacityError, ConfigError
from herdbook.model.decoder import Decoder
from herdbook.model.layers import Int4Linear
from herdbook.model.precision import compute_device, compute_dtype
from herdbook.serving.setup import Setup

from .conftest import tiny

GPU = torch.device("cuda")


def test_what_is_chosen(tiny_folder: Path) -> None:
    assert herdbook.load(tiny_folder).decoder.device.type == compute_device()
    own = herdbook.load(tiny_folder, device="cpu")
    assert own.decoder.device.type == "cpu" and own.decoder.dtype == compute_dtype("cpu")
    engine = Setup([], device="cpu").engine(str(tiny_folder), None, {})
    assert engine.model.place == "cpu"


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"device='gpu' is not known"):
        herdbook.load("never looked for", device="gpu")  # type: ignore[arg-type]
    with (
        patch("herdbook.model.precision.compute_device", lambda: "cpu"),
        pytest.raises(
            ConfigError, match=r"(?s)device='cuda' is not there: torch sees no GPU.*doctor"
        ),
    ):
        herdbook.load("never looked for", device="cuda")


def free(tokens: int) -> object:
    """A GPU with room for twice as many tokens of the tiny model, which is what a cache takes."""
    room = 2 * tokens * token_bytes(tiny().config, "float32")
    return patch("torch.cuda.mem_get_info", lambda: (room, 10 * room))


def test_the_cache_fits_the_gpu() -> None:
    config = tiny().config
    ordinary = cache_pages(config, "float32", 16, None)
    with free(160):  # type: ignore[attr-defined]
        assert cache_pages(config, "float32", 16, None, place="cuda") == 10 < ordinary
        each = token_bytes(config, "float32")
        assert cache_pages(config, "float32", 16, 320 * each, place="cuda") == 20
        with pytest.raises(CapacityError, match=r"more than the .* bytes that are free on the GPU"):
            cache_pages(config, "float32", 16, 321 * each, place="cuda")
        with patch.object(Decoder, "device", GPU):
            assert cache_kind(tiny(), None) == "bfloat16", "160 of 256 tokens, or 320"
    with free(10**6):  # type: ignore[attr-defined]
        assert cache_pages(config, "float32", 16, None, place="cuda") == ordinary


def test_four_bits_away_from_the_cpu_are_dequantised() -> None:
    """The kernel for few rows is the CPU's; the layer may have been moved since it was made."""
    codes, half = torch.randint(0, 256, (32, 2, 16), dtype=torch.uint8), torch.rand(32, 2).half()
    layer = Int4Linear(codes, half, half, None, torch.float32)
    x = torch.randn(3, 64)
    layer(x)  # its packed twin is on the CPU from now on
    assert layer.to("meta")(x.to("meta")).device.type == "meta"


def test_an_engine_whose_device_is_another() -> None:
    engine = Engine(tiny().to("meta"), None, pages=8)
    assert engine.runner.plain.cache.keys[0].device.type == "meta" and engine.runner._native is None
