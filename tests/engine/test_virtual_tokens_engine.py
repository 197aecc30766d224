"""Virtual tokens in the engine: the first pages of their sequences, shared, and never told of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import CapacityError, ConfigError
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_source
from herdbook.model.layout import Packed
from herdbook.model.modules import build
from herdbook.model.soft import Prefix, Prompt, Soft, apply_soft
from herdbook.training import peft_format

from .conftest import prompts, tiny

FAMILIES = Path(__file__).parents[1] / "model" / "families"
KINDS = {"prefix": Prefix, "prompt": Prompt}


def with_soft(
    decoder: Decoder, kind: type[Soft], tokens: int, folder: Path | None = None
) -> Decoder:
    """A decoder with random virtual tokens, which are saved in the folder."""
    soft = apply_soft(decoder, kind, tokens)
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(tokens))
    if folder is not None:
        folder.mkdir()
        peft_format.save(decoder, folder, base="base")
    return decoder.eval()


@torch.inference_mode()
def naive(decoder: Decoder, ids: list[int], count: int) -> list[int]:
    """Greedy decoding, everything computed again for each token."""
    ids, start = list(ids), len(ids)
    while len(ids) < start + count:
        hidden = decoder(torch.tensor(ids), Packed([len(ids)]))
        ids.append(int(decoder.logits(hidden[-1:]).argmax()))
    return ids[start:]


@pytest.mark.parametrize("max_batch_tokens", [3, 512])
def test_each_request_its_own(tmp_path: Path, max_batch_tokens: int) -> None:
    models = {None: tiny()} | {
        name: with_soft(tiny(), KINDS[name], 4 + n, tmp_path / name) for n, name in enumerate(KINDS)
    }
    engine = Engine(tiny(), None, page_tokens=4, pages=200, max_batch_tokens=max_batch_tokens)
    for name in KINDS:
        engine.load_adapter(name, tmp_path / name)
    asked = [(ids, name) for ids in prompts(3, 3, 20) for name in models]
    for _ in range(2):  # the second time out of the cache
        replies = engine.generate([Request(i, Sampling(max_tokens=8), adapter=n) for i, n in asked])
        for (ids, name), reply in zip(asked, replies, strict=True):
            assert list(reply.ids) == naive(models[name], ids, 8)
            assert reply.prompt_tokens == len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_pages_are_shared(kind: str, tmp_path: Path) -> None:
    """Computed once, whatever the prompts are; not with those of the base."""
    with_soft(tiny(), KINDS[kind], 9, tmp_path / "ann")
    engine = Engine(tiny(), None, page_tokens=4, pages=200)
    engine.load_adapter("ann", tmp_path / "ann")
    for n, name in enumerate(["ann", "ann", None]):
        request = Request([5 + n, 6, 7, 8], Sampling(max_tokens=1), adapter=name)
        engine.submit(request)
        engine.step()
    computed = engine.stats()["prefill_tokens"]
    assert computed == (9 + 4) + (1 + 4) + 4  # two pages of four are there the second time


@pytest.mark.parametrize("kind", KINDS)
def test_a_carried_one_is_scored_and_embedded_without_its_tokens(kind: str) -> None:
    decoder = with_soft(tiny(), KINDS[kind], 5)
    engine = Engine(decoder, None, page_tokens=4, max_batch_tokens=6)
    ids = prompts(1, 12, 12)[0]
    with torch.inference_mode():
        hidden = decoder(torch.tensor(ids), Packed([12]))
        chances = decoder.logits(hidden).log_softmax(-1)
    assert np.allclose(engine.embed([ids])[0], hidden.mean(0), atol=1e-5)
    [score] = engine.score(ids[:4], [ids[4:]])
    wanted = [float(chances[n + 3, token]) for n, token in enumerate(ids[4:])]
    assert score.logprobs == pytest.approx(wanted, abs=1e-4)
    sampling = Sampling(max_tokens=2, prompt_logprobs=0)
    [reply] = engine.generate([Request(ids, sampling)])
    assert reply.prompt_logprobs is not None and reply.prompt_logprobs[0] is None
    told = [one.logprob for one in reply.prompt_logprobs[1:] if one is not None]
    assert told == pytest.approx([float(chances[n, ids[n + 1]]) for n in range(11)], abs=1e-4)
    with pytest.raises(CapacityError):
        most = engine.most_tokens
        engine.submit(Request([1] * (most - 4), Sampling(max_tokens=1)))


@pytest.mark.parametrize("family", ["chatglm", "glm_130b", "gemma2", "mistral", "bloom"])
def test_families(family: str) -> None:
    """Contexts that see themselves whole, windows, ALiBi: pages hold what a pack computes."""
    source = json.loads((FAMILIES / f"{family}.json").read_text())
    decoder = Decoder(by_source(source, "fixture").config(source, "fixture"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(float("norm" in name and "bias" not in name), 0.2)
    ids = [7, 9, 11, 30, 8]
    if marks := decoder.config.prefix:
        ids += [marks.whole, marks.start, 12, 13]
        with pytest.raises(ConfigError, match="contexts see themselves whole"):
            apply_soft(decoder, Prompt, 3)
    with_soft(decoder, Prefix, 6)
    [score] = Engine(decoder, None, page_tokens=4).score(ids, [[5, 6, 7]])
    with torch.inference_mode():
        row = [*ids, 5, 6, 7]
        chances = decoder.logits(decoder(torch.tensor(row), Packed([len(row)]))).log_softmax(-1)
    wanted = [float(chances[len(ids) - 1 + n, 5 + n]) for n in range(3)]
    assert score.logprobs == pytest.approx(wanted, abs=1e-3)


def test_a_model_without_pages_has_no_place_for_them() -> None:
    source = json.loads((FAMILIES / "rwkv.json").read_text())
    with pytest.raises(ConfigError, match="have no place"):
        apply_soft(build(by_source(source, "x").config(source, "x")), Prefix, 3)
