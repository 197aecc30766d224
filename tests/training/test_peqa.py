"""PEQA: the scales of a packaged model are trained, saved, merged without loss, and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from raising import stock, tune
from test_few_bits import packaged  # noqa: F401 - a fixture
from test_methods import agree
from test_resume import Interrupting, files

import herdbook
from herdbook.book.book import Book
from herdbook.compression.merge import Merge
from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import ConfigError, FileError
from herdbook.files import gguf
from herdbook.model.checkpoint import load_decoder
from herdbook.model.layers import Int4Linear, Int8Linear
from herdbook.model.layout import Packed
from herdbook.model.lora import adapters_of, bypass
from herdbook.model.peqa import PEQALinear
from herdbook.training import peft_format

CHAT = [{"role": "user", "content": "who are you"}]
KINDS = ("Q4_1", "Q8_0", "int4", "int8")


def layer(kind: str) -> PEQALinear:
    torch.manual_seed(0)
    scale, bias = torch.rand(6, 3).half() * 0.1 + 0.01, torch.randn(6)
    if kind == "int8":
        codes = torch.randint(-127, 128, (6, 3, 32), dtype=torch.int8)
        return PEQALinear(Int8Linear(codes, scale.float(), bias, torch.float32), False)
    codes = torch.randint(0, 256, (6, 3, 16), dtype=torch.uint8)
    zero = torch.randint(0, 16, (6, 3))
    minimum = torch.randn(6, 3).half() if kind == "minima" else -zero * scale.float()
    base = Int4Linear(codes, scale, minimum, bias, torch.float32)
    base.has_kernel = False
    return PEQALinear(base, kind == "minima")


@pytest.mark.parametrize("kind", ["minima", "zeros", "int8"])
def test_it_equals_its_plain_twin(kind: str) -> None:
    one = layer(kind)
    x = torch.randn(5, 96, requires_grad=True)
    torch.testing.assert_close(one(x), one.base(x), rtol=0, atol=0)  # it starts as its base
    with torch.no_grad():
        one.factor.add_(torch.randn_like(one.factor) * 0.2)
    agree(one, one(x), one.plain(x), x)
    exact = one.base.dense(torch.float32) * one.factor.repeat_interleave(32, 1)
    assert 0 < (one.dense(torch.float32) - exact).norm() < 1e-3 * exact.norm()  # of the rounding
    assert torch.equal(one.merge()(x), one(x))
    one.bypassed = True
    assert torch.equal(one(x), one.base(x))


@pytest.fixture(scope="module", params=KINDS)
def shelf(
    request: pytest.FixtureRequest,
    packaged: dict[str, Path],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Book]:
    book, _, _ = stock(tmp_path_factory.mktemp("home"), packaged[request.param])
    return request.param, book


def peqa(**changes: Any) -> Any:
    return tune(**({"method": "peqa", "dropout": 0.0, "epochs": 6, "save_every": 99} | changes))


def test_learns_is_merged_exactly_and_served(shelf: tuple[str, Book]) -> None:
    kind, book = shelf
    adapter = peqa().run(book, name="tuned")
    assert adapter.metrics["loss"] < 0.8 * adapter.metrics["first_loss"]
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PEQA" and config["base_kept"] == "packaged"
    base = book.get("base")

    merged = Merge(model="base", adapter="tuned").run(book, name="merged")
    assert merged.metrics["max_logit_difference"] == 0 and merged.metrics["merged_matrices"] == 21
    before = load_decoder(base.path, torch.float32, quantised=True)
    after = load_decoder(merged.path, torch.float32, quantised=True)
    peft_format.load(before, adapter.path)
    moved = 0
    for name, one in adapters_of(before).items():
        served: Any = after.get_submodule(name)
        assert torch.equal(served.codes, one.base.codes)
        assert torch.equal(served.dense(torch.float32), one.dense(torch.float32))
        moved += not torch.equal(served.dense(torch.float32), one.base.dense(torch.float32))
    assert moved == 21
    if kind.startswith("Q"):
        files = [folder / "model.gguf" for folder in (base.path, merged.path)]
        assert files[0].stat().st_size == files[1].stat().st_size
        old, new = map(gguf.read, files)
        assert old.metadata == new.metadata and old.tensors == new.tensors
        assert torch.equal(*(torch.from_numpy(one.raw("token_embd.weight")) for one in (old, new)))

    # unmerged, merged, and chosen by request
    tuned = herdbook.load("tuned", book=book, dtype="float32")
    whole = herdbook.load("merged", book=book, dtype="float32")
    ids = tuned.render([*CHAT, {"role": "assistant", "content": "I am"}]).ids
    assert torch.equal(tuned.logits(ids), whole.logits(ids))
    assert tuned.generate(CHAT, max_tokens=8) == whole.generate(CHAT, max_tokens=8)
    plain = herdbook.load("base", book=book, dtype="float32")
    untuned = plain.logits(ids)
    assert (tuned.logits(ids) - untuned).abs().max() > 0.05
    engine = Engine(plain.decoder, plain.tokenizer)
    engine.load_adapter("one", adapter.path)
    prompt = plain.render(CHAT, reply=True).ids
    names = ("one", None, "one")
    requests = [Request(prompt, Sampling(max_tokens=8), adapter=name) for name in names]
    replies = engine.generate(requests)
    alone = herdbook.load("base", book=book, dtype="float32")
    [untouched] = alone.engine.generate([Request(prompt, Sampling(max_tokens=8))])
    assert [one.ids for one in replies] == [replies[0].ids, untouched.ids, replies[0].ids]
    said = replies[0].ids  # by PyTorch's layers; the merged model's native step rounds its inputs
    [score] = engine.score(prompt, [said], adapter="one")
    chances = tuned.logits([*prompt, *said]).log_softmax(-1)[len(prompt) - 1 :]
    wanted = [float(chances[at, id]) for at, id in enumerate(said)]
    assert score.greedy and score.logprobs == pytest.approx(wanted, abs=0.03)
    with bypass(before):
        hidden = before(torch.tensor(ids), Packed([len(ids)]))
        assert torch.allclose(before.logits(hidden), untuned, atol=0.05)


def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    shelf: tuple[str, Book],
    packaged: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    kind, book = shelf
    step = peqa(epochs=2, save_every=2, targets=("q", "down"), last_layers=2)
    whole = step.run(book)
    assert whole.metrics["trainable_parameters"] == 2 * (64 * 64 + 64 * 160) // 32
    other, _, _ = stock(tmp_path, packaged[kind])
    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        step.run(other, progress=progress)
    resumed = step.run(other, progress=progress)
    assert any(line.startswith("going on after step") for line in progress.said)
    assert files(resumed.path) == files(whole.path)


def test_what_cannot_be(tmp_path: Path, tiny_folder: Path, packaged: dict[str, Path]) -> None:  # noqa: F811
    book, _, _ = stock(tmp_path, tiny_folder)
    with pytest.raises(ConfigError, match="keeps no matrix in 4 or 8 bits so there are no scales"):
        peqa().run(book)
    for also in ({"whole": ("embed",)}, {"base": "nf4"}, {"dora": True}):
        with pytest.raises(ConfigError):
            peqa(**also).run(book)
    other, _, _ = stock(tmp_path / "few", packaged["int4"])
    made = peqa(epochs=1).run(other, name="tuned")
    with pytest.raises(ConfigError, match="scales go into the base's own file"):
        Merge(model="base", adapter="tuned", dtype="bfloat16").run(other)
    dense = load_decoder(packaged["int4"], torch.float32)
    with pytest.raises(FileError, match=r"moves the scales of model.layers.0.*in no 4 or 8 bits"):
        peft_format.load(dense, made.path)
    assert not adapters_of(dense)
