"""Adapters chosen request by request: each reply is what its tuned model alone gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import FileError, RequestError
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_source
from herdbook.model.layers import Int4Linear
from herdbook.model.lora import TARGETS, apply_lora, merge_lora
from herdbook.model.modules import build
from herdbook.training import peft_format

from .conftest import naive, prompts, tiny
from .test_native import CONFIG, needs_native, quantised

FAMILIES = Path(__file__).parents[1] / "model" / "families"


def tune(decoder: Decoder, folder: Path, seed: int, **how: int) -> Decoder:
    """Put random adapters on a decoder, save them, and merge them."""
    targets = ("q", "v", "o", "down") if seed % 2 else tuple(TARGETS)
    adapters = apply_lora(decoder, targets=targets, rank=2 + seed, alpha=6.0, seed=seed, **how)
    torch.manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.B.normal_(0, 0.2)
    folder.mkdir()
    peft_format.save(decoder, folder, base="base")
    merge_lora(decoder)
    return decoder.eval()


@pytest.fixture
def tuned(tmp_path: Path) -> dict[str | None, Decoder]:
    """The base, and two models tuned from it; each adapter's folder has its name."""
    return {None: tiny()} | {
        name: tune(tiny(), tmp_path / name, seed) for seed, name in enumerate(("ann", "bob"), 1)
    }


def engine_with(decoder: Decoder, folder: Path, *names: str, **sizes: int) -> Engine:
    engine = Engine(decoder, None, page_tokens=4, pages=200, **sizes)
    for name in names:
        engine.load_adapter(name, folder / name)
    return engine


@pytest.mark.parametrize("max_batch_tokens", [3, 16, 512])
def test_two_adapters_and_the_base_in_one_batch(
    tuned: dict[str | None, Decoder], tmp_path: Path, max_batch_tokens: int
) -> None:
    engine = engine_with(tuned[None], tmp_path, "ann", "bob", max_batch_tokens=max_batch_tokens)
    asked = [(ids, name) for ids in prompts(3, 3, 20) for name in ("ann", None, "bob", "ann")]
    said = {(tuple(ids), name): naive(tuned[name], ids, 10) for ids, name in asked}
    assert len({tuple(one) for one in said.values()}) > 6, "adapters that change something"
    for _ in range(2):  # the second time out of the cache
        replies = engine.generate(
            [Request(i, Sampling(max_tokens=10), adapter=n) for i, n in asked]
        )
        for (ids, name), reply in zip(asked, replies, strict=True):
            assert list(reply.ids) == said[tuple(ids), name]


def test_pages_are_not_shared_between_adapters(
    tuned: dict[str | None, Decoder], tmp_path: Path
) -> None:
    engine = engine_with(tuned[None], tmp_path, "ann", "bob")
    ids = prompts(1, 30, 30)[0]
    for name, cached in ((None, 0), ("ann", 0), ("bob", 0), ("ann", 28), (None, 28)):
        [reply] = engine.generate([Request(ids, Sampling(max_tokens=4), adapter=name)])
        assert reply.cached_tokens == cached
        assert list(reply.ids) == naive(tuned[name], ids, 4)


@pytest.mark.parametrize("name", [None, "ann", "bob"])
def test_likelihoods_and_embeddings_under_an_adapter(
    tuned: dict[str | None, Decoder], tmp_path: Path, name: str | None
) -> None:
    engine = engine_with(tuned[None], tmp_path, "ann", "bob")
    alone = Engine(tuned[name] if name else tiny(), None)
    ids = prompts(1, 12, 12)[0]
    ours, theirs = engine.score(ids, [[1, 2], [3]], adapter=name), alone.score(ids, [[1, 2], [3]])
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert np.allclose(engine.embed([ids], adapter=name), alone.embed([ids]), atol=1e-5)


def test_loading_and_unloading(tuned: dict[str | None, Decoder], tmp_path: Path) -> None:
    base = tuned[None]
    engine = engine_with(base, tmp_path, "ann")
    ids = prompts(1, 12, 12)[0]
    request = Request(ids, Sampling(max_tokens=8), adapter="ann", id="one")
    engine.submit(request)
    engine.step()
    with pytest.raises(RequestError, match="adapter 'ann' is in use by 1 requests"):
        engine.unload_adapter("ann")
    with pytest.raises(RequestError, match="'ann' is loaded already"):
        engine.load_adapter("ann", tmp_path / "bob")
    engine.abort("one")
    engine.unload_adapter("ann")
    assert list(engine.adapters) == []
    assert not any(module._forward_hooks for module in base.modules())
    # another adapter under the same name: nothing of the first is left in the cache
    engine.load_adapter("ann", tmp_path / "bob")
    [reply] = engine.generate([replace(request, id="two")])
    assert reply.cached_tokens == 0 and list(reply.ids) == naive(tuned["bob"], ids, 8)


def test_names_that_are_not_loaded(tuned: dict[str | None, Decoder], tmp_path: Path) -> None:
    engine = engine_with(tuned[None], tmp_path, "ann")
    with pytest.raises(RequestError, match=r"(?s)adapter 'anne' is not loaded.*mean 'ann'\?"):
        engine.submit(Request([1], adapter="anne"))
    with pytest.raises(RequestError, match="adapter 'bob' is not loaded"):
        engine.unload_adapter("bob")
    assert not engine.busy


def test_adapters_that_cannot_be_chosen_by_request(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"adapter_config\.json is not there"):
        Engine(tiny(), None).load_adapter("none", tmp_path)
    with pytest.raises(FileError, match="names no matrix"):
        tune(tiny(), tmp_path / "ann", 1)
        config = DecoderConfig(**{**vars(tiny().config), "layers": 1})
        Engine(Decoder(config), None).load_adapter("ann", tmp_path / "ann")
    carrying = tiny()
    peft_format.load(carrying, tmp_path / "ann")
    with pytest.raises(RequestError, match="carries one already"):
        Engine(carrying, None).load_adapter("ann", tmp_path / "ann")
    source = json.loads((FAMILIES / "rwkv.json").read_text())
    state = build(by_source(source, "fixture").config(source, "fixture"))
    with pytest.raises(RequestError, match="cannot be chosen request by request"):
        Engine(state, None).load_adapter("ann", tmp_path / "ann")


@pytest.mark.parametrize("family", ["gpt2", "falcon", "bloom", "qwen3", "chatglm", "mixtral"])
def test_families(family: str, tmp_path: Path) -> None:
    """Packed, turned and prefixed ones; in a mixture the adapters on experts are refused."""
    source = json.loads((FAMILIES / f"{family}.json").read_text())
    described = by_source(source, "fixture")

    def made() -> Decoder:
        decoder = Decoder(described.config(source, "fixture"))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                parameter.normal_(float("norm" in name and "bias" not in name), 0.2)
        decoder.family = described.name
        return decoder.eval()

    base = made()
    if family == "mixtral":
        tune(made(), tmp_path / "ann", 1)
        with pytest.raises(RequestError, match=r"tunes blocks.0.mlp.experts.0.down"):
            Engine(base, None).load_adapter("ann", tmp_path / "ann")
        return
    tuned = tune(made(), tmp_path / "ann", 2)
    engine = engine_with(base, tmp_path, "ann")
    marks = [base.config.prefix.whole, base.config.prefix.start] if base.config.prefix else []
    ids = [7, 9, 11, 30, 8, *marks]
    for name, alone in (("ann", tuned), (None, base)):
        [score] = engine.score(ids, [[5, 6, 7]], adapter=name)
        [theirs] = Engine(alone, None).score(ids, [[5, 6, 7]])
        assert score.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_grouped_adapters(tmp_path: Path) -> None:
    tuned = tune(tiny(), tmp_path / "ann", 2, group=8)
    engine = engine_with(tiny(), tmp_path, "ann")
    ids = prompts(1, 12, 12)[0]
    [reply] = engine.generate([Request(ids, Sampling(max_tokens=8), adapter="ann")])
    assert list(reply.ids) == naive(tuned, ids, 8)


@needs_native
def test_a_quantised_base_and_its_native_step(tmp_path: Path) -> None:
    """Adapters on layers of 4 bits; base and adapter decode side by side, each in its way."""
    base = quantised(CONFIG)
    dense = Decoder(CONFIG)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            layer = base.get_submodule(name.rpartition(".")[0])
            kept = isinstance(layer, Int4Linear) and name.endswith("weight")
            parameter.copy_(layer.dense(torch.float32) if kept else base.get_parameter(name))
    tuned = tune(dense, tmp_path / "ann", 2)
    engine = Engine(base, None)
    assert engine.runner._native is not None
    ids = [n % 90 for n in range(20)]
    plainly = engine.generate([Request(ids, Sampling(max_tokens=12))])[0].ids
    engine.load_adapter("ann", tmp_path / "ann")
    replies = engine.generate(
        [Request(ids, Sampling(max_tokens=12), adapter=name) for name in ("ann", None)]
    )
    assert list(replies[0].ids) == naive(tuned, ids, 12)
    assert replies[1].ids == plainly
