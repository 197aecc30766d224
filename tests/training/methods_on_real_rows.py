"""Every tuning method on a real model and real rows: it learns, and what is saved is what was learnt.

make methods     (minutes; needs the folder of real data, see tests/conftest.py)

SmolLM2-135M, 16 short rows of Stanford Alpaca, three times over in 24 steps of two. The same rows are
read in each pass, so the mean loss of the last one is compared with that of the first.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from herdbook.book.book import Artifact, Book
from herdbook.data.user import Import
from herdbook.model.checkpoint import load_decoder
from herdbook.model.decoder import Decoder
from herdbook.model.fetch import Fetch
from herdbook.model.layout import Packed
from herdbook.training import classify, peft_format, planning, tune
from herdbook.training.classify import Classify
from herdbook.training.tune import Tune

ROWS, PASSES = 16, 3
#: settings, and what at least the last pass's mean loss is below the first one's, as a share of it
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "full": ({"method": "full", "learning_rate": 5e-5, "save_every": 99}, 0.6),
    "freeze": ({"method": "freeze", "last_layers": 4, "learning_rate": 2e-4}, 0.5),
    "lora": ({}, 0.5),
    "rslora": ({"rslora": True}, 0.5),
    "dora": ({"dora": True}, 0.5),
    "nf4": ({"base": "nf4"}, 0.5),
    "int4": ({"base": "packaged"}, 0.5),
    "prefix": ({"method": "prefix", "learning_rate": 1e-2}, 0.15),
    "prompt": ({"method": "prompt", "learning_rate": 1e-2}, 0.1),
    "ia3": ({"method": "ia3", "learning_rate": 1e-2}, 0.5),
    "peqa": ({"method": "peqa", "learning_rate": 2e-4}, 0.15),
    "rows of new tokens": ({"whole": ("embed",), "rows_from": 40_000}, 0.5),
    "base on disk": ({"offload": ("base", "optimiser"), "seed": 1}, 0.5),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, shared_data: Callable[[str], Path]) -> Book:
    """The model, and the rows as a dataset and as texts of two kinds."""
    home = tmp_path_factory.mktemp("home")
    book = Book(home)
    Fetch(ref="smollm2").run(book, name="base")
    with gzip.open(shared_data("alpaca/alpaca_data.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if len(line) < 330]
    short = [one for one in rows if not one["input"] and 40 < len(one["output"]) < 140][:ROWS]
    assert len(short) == ROWS
    (home / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in short))
    Import(data=str(home / "rows.jsonl"), heldout=0.0).run(book, name="rows")
    asked = [one["instruction"] for one in rows if one["instruction"].endswith("?")][:ROWS]
    told = [one["instruction"] for one in rows if one["instruction"].endswith(".")][:ROWS]
    kinds = [(text, "question") for text in asked] + [(text, "task") for text in told]
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in kinds]
    (home / "kinds.jsonl").write_text("".join(lines))
    return book


def passes(made: Artifact, count: int = PASSES) -> tuple[float, float]:
    """The mean loss of the first pass over the rows, and of the last."""
    lines = (made.path / "losses.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    each = len(losses) // count
    return sum(losses[:each]) / each, sum(losses[-each:]) / each


@torch.no_grad()
def answers(decoder: Decoder) -> Tensor:
    """Logits of some ids, or a classifier's scores."""
    was, ids = decoder.training, torch.arange(100, 3000, 71)
    decoder.eval()
    hidden = decoder(ids, Packed((len(ids) - 9, 9)))
    found = decoder.scores(hidden) if decoder.config.labels else decoder.logits(hidden)
    decoder.train(was)
    return found


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the trained decoder answers at the moment when it is saved."""
    seen: list[Tensor] = []

    def note(module: Any, name: str) -> None:
        right = getattr(module, name)

        def noted(decoder: Decoder, *rest: Any, **more: Any) -> Any:
            seen.append(answers(decoder))
            return right(decoder, *rest, **more)

        monkeypatch.setattr(module, name, noted)

    for module, name in ((peft_format, "save"), (tune, "save_hf"), (classify, "save_hf")):
        note(module, name)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_is_what_was_saved(name: str, shelf: Book, saved: list[Tensor]):
    settings, margin = METHODS[name]
    how = Tune(
        model="base", data=("rows",), batch=2, epochs=PASSES, length=128, pack=256,
        schedule="constant", warmup_ratio=0.0, **settings,
    )  # fmt: skip
    made = how.run(shelf, name="made")
    first, last = passes(made)
    print(f"{name}: {first:.3f} → {last:.3f}, {made.metrics['seconds']} s")
    assert made.metrics["steps"] == ROWS * PASSES // 2
    assert last < (1 - margin) * first
    if how.kind == "model":
        loaded = load_decoder(made.path, dtype=planning.dtype_of(how))
    else:
        loaded = how._load(shelf.get("base"), planning.dtype_of(how))
        peft_format.load(loaded, made.path)
    base = answers(how._load(shelf.get("base"), planning.dtype_of(how)))
    assert torch.equal(answers(loaded), saved[-1])
    assert not torch.allclose(base, saved[-1], atol=1e-2)


def test_a_classifier_learns_and_is_what_was_saved(shelf: Book, saved: list[Tensor]):
    how = Classify(
        model="base", file=str(shelf.home / "kinds.jsonl"), batch=4, epochs=PASSES, length=64,
        pack=256, schedule="constant", learning_rate=1e-3, heldout=0.0,
    )  # fmt: skip
    made = how.run(shelf, name="made")
    first, last = passes(made)
    print(f"classify: {first:.3f} → {last:.3f}, {made.metrics['seconds']} s")
    assert last < 0.5 * first
    assert torch.equal(answers(load_decoder(made.path, dtype=torch.float32)), saved[-1])
