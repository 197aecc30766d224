"""Published runs, on paper: each figure with its source, all within 20 %."""

from __future__ import annotations

import pytest

from herdbook.errors import ConfigError, UnknownName
from herdbook.training import hardware, scaling
from herdbook.training.hardware import CARDS, card_memory, shape, tokens_per_second

near = {"rel": 0.2}
GIB = 2**30


def test_llama_65b():
    """Touvron et al., 2023 (arXiv:2302.13971): 380 tokens/s/GPU on 2,048 A100, 1.4 T tokens, 21 days."""
    speed = tokens_per_second(shape("llama-65b"), CARDS["A100-80GB"], "tuned", 2048)
    assert speed == pytest.approx(380, **near)
    assert 1.4e12 / speed / 2048 / 86_400 == pytest.approx(21, **near)


@pytest.mark.parametrize(
    ("name", "length", "rows", "hours"),
    [
        ("llama-7b", 512, 52_002, 3),  # Stanford Alpaca: 8 A100-80GB, 3 epochs
        ("llama-13b", 2048, 70_000, 24),  # Vicuna-13B: 8 A100, 3 epochs, about 70,000 chats, a day
    ],
)
def test_alpaca_and_vicuna(name: str, length: int, rows: int, hours: float):
    speed = tokens_per_second(shape(name), CARDS["A100-80GB"], "plain", length)
    assert 3 * rows * length / speed / 8 / 3600 == pytest.approx(hours, **near)
    spread = card_memory(shape(name), length, method="full", recompute=True, cards=8)
    assert spread.peak < CARDS["A100-80GB"].memory


@pytest.mark.parametrize(
    ("method", "nf4", "gib", "speed"),
    [("full", False, 18.9, 1650), ("lora", False, 16.2, 3083), ("lora", True, 7.4, 2413)],
)
def test_torchtune(method, nf4: bool, gib: float, speed: float):
    """torchtune's README: Llama 3.1 8B on an RTX 4090, two rows packed to 2,048, compiled."""
    llama, card = shape("llama-3.1-8b"), CARDS["RTX-4090"]
    found = card_memory(llama, 2 * 2048, method=method, nf4=nf4, recompute=True, fused=True)
    assert found.peak / GIB == pytest.approx(gib, **near)
    frozen = method == "lora"
    assert tokens_per_second(llama, card, "tuned", 2048, frozen=frozen) == pytest.approx(
        speed, **near
    )


@pytest.mark.parametrize(("nf4", "gb"), [(False, 21.30), (True, 14.14)])
def test_litgpt(nf4: bool, gb: float):
    """litgpt's tutorials/resource-tables.md: Llama 2 7B, LoRA r8 on q and v (4,194,304 weights) with
    dropout, A100-40GB, a row of 1,304 tokens."""
    found = card_memory(shape("llama-2-7b"), 1304, method="lora", nf4=nf4, dropout=True)
    assert found.gradients == 2 * 4_194_304
    assert found.peak / 1e9 == pytest.approx(gb, **near)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("llama-7b", 6.738e9), ("llama-65b", 65.286e9), ("llama-3.1-8b", 8.030e9)],
)
def test_shapes_have_their_published_sizes(name: str, weights: float):
    assert hardware.weights_of(shape(name)) == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize(
    ("flops", "weights", "tokens"),
    [
        (1.92e19, 400e6, 8.0e9),  # Hoffmann et al., 2022, table 3
        (1.21e20, 1e9, 20.2e9),
        (1.23e22, 10e9, 205.1e9),
        (5.76e23, 67e9, 1.5e12),  # Gopher's budget
        (3.85e24, 175e9, 3.7e12),
        (9.90e24, 280e9, 5.9e12),
        (3.43e25, 520e9, 11.0e12),
        (1.27e26, 1e12, 21.2e12),
        (1.30e28, 10e12, 216.2e12),
    ],
)
def test_chinchilla(flops: float, weights: float, tokens: float):
    assert 6 * weights * tokens == pytest.approx(flops, rel=0.05)  # their own figures, rounded
    best = scaling.for_budget(flops)
    assert best.weights == pytest.approx(weights, rel=0.09)
    assert best.tokens == pytest.approx(tokens, rel=0.09)
    assert best.flops == pytest.approx(flops)


@pytest.mark.parametrize(
    ("rung", "tokens"),
    [("111M", 9037 * 120 * 2048), ("13B", 2.57e11)],  # Cerebras-GPT's model cards
)
def test_the_ladder(rung: str, tokens: float):
    best = scaling.for_size(scaling.LADDER[rung])
    assert best.tokens == pytest.approx(tokens, **near)
    assert scaling.for_budget(best.flops).rung == best.rung == rung


def test_what_is_not_known():
    with pytest.raises(UnknownName, match="llama-7"):
        shape("llama-7")
    with pytest.raises(ConfigError, match="8xA100-80GB"):
        hardware.machine("8xA100")
    with pytest.raises(ConfigError):
        hardware.machine("0xA100-80GB")
    with pytest.raises(UnknownName):
        hardware.share_of("magic")
    assert hardware.machine("8xA100-80GB") == (8, CARDS["A100-80GB"])
