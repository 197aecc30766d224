"""The native decoding step against its PyTorch twin."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from herdbook.engine import compiled, native
from herdbook.engine.cache import Cache
from herdbook.engine.engine import Engine
from herdbook.engine.kept import kept
from herdbook.engine.request import Request, Sampling
from herdbook.engine.runner import step_for
from herdbook.engine.store import Store
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.layers import BLOCK, Int4Linear, Int8Linear, Linear
from herdbook.model.layout import Packed

CONFIG = DecoderConfig(
    vocab=96, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=96, max_pos=256, tied=True
)
CONFIGS = {
    "llama": CONFIG,
    "own head": dataclasses.replace(CONFIG, tied=False),
    "biases": dataclasses.replace(CONFIG, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen3": dataclasses.replace(CONFIG, qk_norm=True, head_dim=32, kv_heads=1),
    "window": dataclasses.replace(CONFIG, windows=(None, 7, 7)),
    "wide head": dataclasses.replace(CONFIG, head_dim=80, heads=2),
}
needs_native = pytest.mark.skipif(compiled.library() is None, reason="no AVX2, or no C++ compiler")


@pytest.fixture(params=["native", "haswell"], autouse=True)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything twice: for this processor as it is, and as one that has AVX2 alone."""
    flags = [one for one in compiled.FLAGS if not one.startswith("-march")]
    monkeypatch.setattr(compiled, "FLAGS", (*flags, f"-march={request.param}"))
    compiled.library.cache_clear()
    yield
    compiled.library.cache_clear()


def quantised(config: DecoderConfig, bits: int = 4, dtype: torch.dtype = torch.float32) -> Decoder:
    """A random decoder whose matrices are kept in blocks."""
    torch.manual_seed(3)
    decoder = Decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.25)
    decoder = decoder.to(dtype)
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, Linear):
            blocks = torch.randint(0, 1 << bits, (layer.outputs, layer.inputs // BLOCK, BLOCK))
            scale = torch.rand(layer.outputs, layer.inputs // BLOCK) * 4 / (1 << bits) / 8
            bias = None if layer.bias is None else layer.bias.data
            made: nn.Module
            if bits == 4:
                codes = blocks.to(torch.uint8)
                packed = codes[..., :16] | (codes[..., 16:] << 4)
                half = scale.half()
                made = Int4Linear(packed, half, half * -7.5, bias, dtype)
            else:
                made = Int8Linear((blocks - 128).to(torch.int8), scale.half().float(), bias, dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(decoder.get_submodule(parent), leaf, made)
    return decoder.eval().requires_grad_(False)


def rounded(x: Tensor) -> Tensor:
    """As the native step rounds what a matrix reads: 8 bits in blocks of 32."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.round(blocks / scale.clamp_min(1e-30)) * scale).flatten(-2)


@contextmanager
def rounding(decoder: Decoder) -> Iterator[None]:
    """Inside, the PyTorch path computes in float32 on such inputs, from dense matrices."""

    class Twin(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.weight, self.bias = layer.dense(torch.float32), layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(rounded(x), self.weight, self.bias)

    before = {}
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, (Int4Linear, Int8Linear)):
            before[name] = layer
            parent, _, leaf = name.rpartition(".")
            setattr(decoder.get_submodule(parent), leaf, Twin(layer))
    project = decoder.embed.project
    head = Int8Linear.of(decoder.embed.weight).dense(torch.float32)
    decoder.embed.project = lambda x: nn.functional.linear(rounded(x), head)  # type: ignore[method-assign]
    try:
        yield
    finally:
        decoder.embed.project = project  # type: ignore[method-assign]
        for name, layer in before.items():
            parent, _, leaf = name.rpartition(".")
            setattr(decoder.get_submodule(parent), leaf, layer)


def native_logits(
    decoder: Decoder,
    prompts: list[list[int]],
    chunk: int = 1,
    kind: str = "float32",
) -> Tensor:
    """Logits [B, T, V] of prompts of equal length, so many tokens a step, through the native step."""
    step = step_for(decoder)
    assert step is not None
    length = len(prompts[0])
    each = -(-length // 16)
    store = Store(decoder.config, each * len(prompts), 16, kind)
    pages = list(range(store.pages))
    random.Random(1).shuffle(pages)
    mine = [pages[b * each : (b + 1) * each] for b in range(len(prompts))]
    rows = []
    for at in range(0, length, chunk):
        spans = [
            native.Span(prompt[at : at + chunk], at, own, wanted=len(prompt[at : at + chunk]))
            for prompt, own in zip(prompts, mine, strict=True)
        ]
        found = torch.from_numpy(step(store, spans)[0])
        rows.append(found.view(len(prompts), -1, decoder.config.vocab))
    return torch.cat(rows, 1)


def prompts(count: int, length: int = 39) -> list[list[int]]:
    dice = random.Random(4)
    return [[dice.randrange(96) for _ in range(length)] for _ in range(count)]


@needs_native
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_is_its_twin(name: str, bits: int) -> None:
    """The same rounding of inputs in PyTorch gives the same logits."""
    decoder = quantised(CONFIGS[name], bits)
    asked = prompts(3)
    got = native_logits(decoder, asked)
    with rounding(decoder), torch.inference_mode():
        for row, prompt in zip(got, asked, strict=True):
            want = decoder.logits(decoder(torch.tensor(prompt), Packed([len(prompt)])))
            off = (row - want).abs() / want.std()
            # an input on the edge between two codes may fall to the other side, which spreads
            assert off.median() <= 1e-2 and off.mean() <= 3e-2 and off[:3].median() <= 1e-3


@needs_native
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_depends_on_its_own_sequence_alone(name: str, kind: str) -> None:
    """Bit by bit: alone or among others, token by token, in chunks or the whole prompt at once."""
    decoder = quantised(CONFIGS[name])
    asked = prompts(11)
    together = native_logits(decoder, asked, kind=kind)
    for chunk in (3, 8, 39):
        assert torch.equal(native_logits(decoder, asked, chunk, kind), together)
    for row, prompt in zip(together[:3], asked, strict=False):
        assert torch.equal(native_logits(decoder, [prompt], kind=kind)[0], row)


@needs_native
@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_a_smaller_cache_stays_near(kind: str, most: float) -> None:
    decoder = quantised(CONFIG)
    exact, near = (
        native_logits(decoder, prompts(2)),
        native_logits(decoder, prompts(2), kind=kind),
    )
    assert (near - exact).abs().mean() <= most * exact.std()
    assert not torch.equal(near, exact)


@needs_native
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_what_lies_in_the_cache_is_what_the_twin_puts_there(kind: str) -> None:
    decoder = quantised(CONFIG)
    step = step_for(decoder)
    assert step is not None
    dtype = getattr(torch, kind)
    stores = Store(CONFIG, 3, 16, "float32"), Store(CONFIG, 3, 16, kind)
    exact = Cache(decoder, 3, 16, torch.float32, stores[0])
    found, twin = (Cache(decoder, 3, 16, dtype, store) for store in (stores[1], None))
    span = native.Span(prompts(1)[0], 0, [2, 0, 1])
    for store in stores:
        step(store, [span])
    slots = torch.tensor([span.pages[at // 16] * 16 + at % 16 for at in range(39)])
    k, v = (one[0].flatten(0, 1)[slots] for one in (exact.keys, exact.values))
    twin.write(0, slots, k, v)
    assert torch.equal(found.keys[0], twin.keys[0]) and torch.equal(found.values[0], twin.values[0])
    if kind == "int8":
        assert torch.equal(found.scales[0], twin.scales[0])
        read = twin.read(0, slice(0, 3), torch.float32)[0].flatten(0, 1)[slots]
        step_of = k.abs().amax(-1, keepdim=True) / 127
        assert ((read - k).abs() <= 0.51 * step_of).all()


@needs_native
def test_the_least_numbers_of_an_int8_cache() -> None:
    """Zeros, denormals and what lies about the least normal scale: safe, and the same in both."""
    decoder = quantised(CONFIGS["biases"], 8)
    attention = decoder.blocks[0].attention
    tops = [0.0, 1e-45, 3e-41, 1e-38, 3e-37, 1.4e-36, 127 * torch.finfo(torch.float32).tiny, 1e-35]
    for top in tops:
        for layer in (attention.k, attention.v):
            layer.scale.zero_()
            layer.bias.copy_(torch.linspace(-top, top, 32).view(2, 16).flip(0).flatten())
        assert native_logits(decoder, prompts(1), kind="int8").isfinite().all()
        step = step_for(decoder)
        assert step is not None
        stores = Store(CONFIG, 3, 16, "float32"), Store(CONFIG, 3, 16, "int8")
        for store in stores:
            step(store, [native.Span(prompts(1)[0], 0, [0, 1, 2])])
        exact = Cache(decoder, 3, 16, torch.float32, stores[0])
        found, twin = (Cache(decoder, 3, 16, torch.int8, store) for store in (stores[1], None))
        k, v = (one[0].flatten(0, 1)[:39] for one in (exact.keys, exact.values))
        twin.write(0, torch.arange(39), k, v)
        for mine, its in ((found.keys, twin.keys), (found.values, twin.values)):
            assert torch.equal(mine[0], its[0]), top
        assert torch.equal(found.scales[0], twin.scales[0]), top
        for got, want in zip(twin.read(0, slice(0, 3), torch.float32), (k, v), strict=True):
            near = 0.51 * want.abs().amax(-1, keepdim=True) / 127
            off = (got.flatten(0, 1)[:39] - want).abs()
            assert (off <= near.clamp_min(1.5e-36)).all(), top


@needs_native
def test_the_engine_computes_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chats, joined at different times, their prompts in chunks; alone each says the same."""
    decoder = quantised(CONFIG)
    rows: list[int] = []
    real = native.Step.__call__

    def counted(self: native.Step, store: Store, spans: list[native.Span]) -> Any:
        rows.append(sum(len(span.ids) for span in spans))
        return real(self, store, spans)

    monkeypatch.setattr(native.Step, "__call__", counted)
    sampling = Sampling(max_tokens=6, ignore_eos=True)

    def ask(some: list[list[int]], budget: int = 64) -> list[tuple[int, ...]]:
        engine = Engine(decoder, None, page_tokens=16, pages=200, max_batch_tokens=budget)
        return [one.ids for one in engine.generate([Request(ids, sampling) for ids in some])]

    asked = [prompt[: 5 + n % 30] for n, prompt in enumerate(prompts(20))]
    together = ask(asked)
    assert max(rows) == 64 and sum(rows) == sum(map(len, asked)) + 20 * 5
    assert together == [ask([prompt])[0] for prompt in asked] == ask(asked, 7 + 16)


@needs_native
@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_hold_what_native_cpp_reads(bits: int) -> None:
    """Every weight at its place, by the layout that is written down at the head of native.cpp."""
    decoder = quantised(dataclasses.replace(CONFIG, hidden=96, heads=2, kv_heads=2), bits)
    layer = decoder.blocks[0].mlp.up
    assert isinstance(layer, (Int4Linear, Int8Linear))
    dense = layer.dense(torch.float32)
    source, found = kept(decoder), compiled.library()
    assert source is not None and found is not None
    packing = native.Packing()
    tiles = torch.from_numpy(packing.add([source.blocks("blocks.0.mlp.up")]))
    packing.run(found)
    tiles = tiles.view(6, 3, 64 * bits + 64)
    for row, block, column in ((0, 0, 0), (5, 1, 17), (16, 2, 31), (31, 0, 14), (95, 2, 3)):
        tile = tiles[row // 16, block]
        part, c = divmod(column, 4)
        byte = tile[64 * (part % bits) + 4 * (row % 16) + c].item()
        code = byte if bits == 8 else (byte >> 4 if part >= 4 else byte & 15)
        floats = tile[64 * bits :].view(torch.float16).float()
        value = floats[row % 16] * code + floats[16 + row % 16]
        assert value == pytest.approx(dense[row, 32 * block + column].item(), abs=1e-6)


def test_a_matrix_of_8_bits_is_recognised() -> None:
    codes = torch.randint(-127, 128, (16, 2, 32))
    codes[..., 0] = 127
    scale = torch.rand(16, 2).half().float()
    found = Int8Linear.of((codes * scale[..., None]).flatten(1))
    assert torch.equal(found.codes.int(), codes.int())
    assert torch.allclose(found.scale[..., 0], scale, rtol=1e-6)
    again = native.Blocks.rounded((codes * scale[..., None]).flatten(1).numpy())
    assert (again.codes == codes.numpy()).all() and np.allclose(again.scale, scale, rtol=1e-6)


@pytest.mark.parametrize("change", [{"gated": False}, {"norm": "ln"}, {"position": "alibi"}])
def test_other_shapes_go_the_plain_way(change: dict[str, object]) -> None:
    assert step_for(quantised(dataclasses.replace(CONFIG, **change))) is None
    assert step_for(Decoder(CONFIG)) is None, "dense matrices"


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERDBOOK_NATIVE", "0")
    assert step_for(quantised(CONFIG)) is None


@pytest.mark.parametrize(("compiler", "why"), [("no-such", "no C++ compiler"), ("false", "failed")])
def test_no_compiler_is_no_fault(
    compiler: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither one that is not there nor one that fails: the plain way, and it is said once."""
    monkeypatch.setenv("HERDBOOK_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if compiler == "no-such":
        monkeypatch.setenv("PATH", str(tmp_path))
    compiled.library.cache_clear()
    for _ in range(2):
        assert step_for(quantised(CONFIG)) is None
    assert len(caplog.messages) == 1 and why in caplog.messages[0]
