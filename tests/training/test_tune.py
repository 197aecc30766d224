"""The step: what it writes and counts, what it refuses, and both methods."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from raising import ROWS, Rows, stock, tune

from herdbook.book.book import Book
from herdbook.data.plain import Text
from herdbook.errors import ConfigError, DataError, FileError
from herdbook.model.checkpoint import load_decoder
from herdbook.progress import Progress
from herdbook.tokens import table
from herdbook.tokens.chat import Rendering
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import peft_format


class Listening(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Book:
    book, _, _ = stock(tmp_path_factory.mktemp("home"), tiny_folder)
    return book


def test_an_adapter_and_its_record(shelf: Book):
    progress = Listening()
    adapter = tune(epochs=3, dropout=0.0).run(shelf, progress=progress)
    assert adapter.kind == "adapter"
    assert sorted(adapter.files) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "losses.jsonl",
    ]
    losses = [json.loads(line) for line in (adapter.path / "losses.jsonl").read_text().splitlines()]
    assert [one["step"] for one in losses] == list(range(1, 16))
    m = adapter.metrics
    assert m["loss"] == losses[-1]["loss"] < losses[0]["loss"] == m["first_loss"]
    assert m["steps"] == 15 and m["rows"] == len(ROWS) and m["dropped_rows"] == 0
    assert m["trained_tokens"] == sum(one["tokens"] for one in losses)
    assert m["total_tokens"] > m["trained_tokens"] > 0
    assert m["tokens_per_s"] > 0 and m["peak_memory_bytes"] > 1e7
    decoder = load_decoder(shelf.get("base").path, dtype=torch.float32)
    loaded = peft_format.load(decoder, adapter.path)
    assert m["trainable_parameters"] == sum(a.A.numel() + a.B.numel() for a in loaded.values())
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == shelf.get("base").id
    assert any("⟦I am a small model" in line for line in progress.said)


def test_full_tuning_makes_a_model(shelf: Book):
    before = {p.name: p.read_bytes() for p in shelf.get("base").path.iterdir()}
    model = tune(method="full", learning_rate=1e-3, epochs=1).run(shelf, name="whole")
    assert model.kind == "model" and "losses.jsonl" in model.files
    old = load_decoder(shelf.get("base").path, dtype=torch.float32)
    new = load_decoder(model.path, dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True)]
    assert all(moved) and len(moved) == 29
    assert {p.name: p.read_bytes() for p in shelf.get("base").path.iterdir()} == before


def test_last_layers_train_these_alone(shelf: Book):
    adapter = tune(last_layers=1, targets=("q", "down"), steps=2).run(shelf, name="last")
    decoder = load_decoder(shelf.get("base").path, dtype=torch.float32)
    assert list(peft_format.load(decoder, adapter.path)) == [
        "blocks.2.mlp.down",
        "blocks.2.attention.q",
    ]
    assert adapter.metrics["steps"] == 2


def test_long_rows_are_dropped_and_counted_or_refused_never_cut(shelf: Book):
    progress = Listening()
    sizes = len(ROWS)
    some = tune(length=28, steps=2).run(shelf, name="short", progress=progress)
    dropped = some.metrics["dropped_rows"]
    assert 0 < dropped < sizes and some.metrics["rows"] == sizes - dropped
    assert any(line.startswith(f"left out {dropped} of {sizes} rows") for line in progress.said)
    with pytest.raises(DataError, match=r"rows@1 line \d+: \d+") as refused:
        tune(length=28, too_long="refuse").run(shelf)
    assert "never cut" in str(refused.value) and "set too_long to drop" in str(refused.value)
    with pytest.raises(DataError, match="20 of 20 rows have more than 5 tokens"):
        tune(length=5).run(shelf)


def test_datasets_are_mixed_by_weight(shelf: Book):
    Rows(rows=("hi|hello",)).run(shelf, name="few")
    both = tune(data=("few", "rows"), steps=1).run(shelf, name="both")
    assert both.metrics["rows"] == 21
    even = tune(data=("few", "rows"), mix=(1, 1), epochs=1, batch=1).run(shelf, name="even")
    assert even.metrics["steps"] == 21
    alone = tune(data=("few",), epochs=1).run(shelf, name="alone").metrics["total_tokens"]
    whole = tune(epochs=1).run(shelf, name="whole").metrics["total_tokens"]
    assert abs(even.metrics["total_tokens"] - 11 * alone - whole / 2) < whole / 8
    with pytest.raises(ConfigError, match="must have a weight above 0 for each"):
        tune(data=("few", "rows"), mix=(1,)).check()


def test_plain_text_is_learnt_whole(shelf: Book, tmp_path: Path):
    notes = tmp_path / "notes.txt"
    notes.write_text("hello who are you I am a small model 你好 " * 30)
    text = Text(data=(str(notes),), heldout=0).run(shelf, name="text")
    progress = Listening()
    found = tune(data=("text",), length=64, epochs=1).run(shelf, name="read", progress=progress)
    tokens = len(Tokenizer.load(shelf.get("base").path).prompt(notes.read_text().strip("\n"))) + 1
    assert found.metrics["trained_tokens"] == tokens - 1, "each but the first is a target once"
    assert any(line.endswith("all of them trained") for line in progress.said)
    assert text.metrics["documents"] == 1


def test_a_row_that_teaches_nothing_is_refused_by_name(shelf: Book, monkeypatch):
    real = table.render

    def unmasked(tokenizer, messages):
        row = real(tokenizer, messages)
        return Rendering(row.ids, [False] * len(row.ids)) if len(row.ids) > 28 else row

    monkeypatch.setattr(table, "render", unmasked)
    with pytest.raises(DataError, match=r"no trained token.*rows@1 line \d+"):
        tune(steps=3, length=127).run(shelf)  # of another length no table is kept


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": ("q", "gat")}, "target 'gat' is no matrix.*did you mean 'gate'"),
        ({"rank": 0}, "tune.rank is 0 but must be above 0"),
        ({"group": 48}, "tune.group is 48 and does not divide the 64 inputs"),
        ({"dropout": 2.0}, "tune.dropout is 2.0 but must be at least 0 and finite, and at most 1"),
        ({"learning_rate": math.nan}, "tune.learning_rate is nan but must be at least 0"),
        ({"clip": -1.0}, "tune.clip is -1.0 but must be at least 0"),
        ({"average": 1.0}, "tune.average is 1.0 but must be at least 0 and finite, and at most 1"),
        ({"precision": "mixed"}, "tune.precision is mixed and tune.method is lora"),
        ({"betas": (0.9, 1.0)}, "tune.betas, 1 of .* is 1.0 but must be"),
        ({"floor": math.nan}, "tune.floor is nan"),
        ({"last_layers": -2}, "tune.last_layers is -2"),
        ({"alpha": 0.0}, "tune.alpha is 0.0 but must be above 0"),
        ({"whole": ("norm",)}, "tune.whole names 'norm' and only the embedding"),
        ({"method": "ia3", "dora": True}, "dora is True which says nothing to method ia3.*to lora"),
        (
            {"method": "full", "targets": ("q",)},
            r"targets is \('q',\) which says nothing to method",
        ),
        (
            {"method": "prefix", "last_layers": 1},
            "last_layers is 1 which says nothing to method pre",
        ),
        ({"method": "prompt", "virtual_tokens": 0}, "tune.virtual_tokens is 0 but must be above 0"),
        ({"method": "freeze"}, "freeze without parts and last_layers would train every weight"),
        ({"method": "freeze", "parts": ("mpl",)}, "names 'mpl' and no weight.*mean 'mlp'"),
        (
            {"method": "freeze", "parts": ("blocks.0.mlp",), "last_layers": 1},
            "last_layers is 1 and no weight of this model is in both",
        ),
        ({"model": ""}, "tune.model is empty"),
        ({"data": ()}, "tune.data is empty"),
    ],
)
def test_settings_that_cannot_be(shelf: Book, changes, message):
    with pytest.raises(ConfigError) as error:
        tune(**changes).run(shelf)
    assert re.search(message, str(error.value), re.DOTALL)


def test_broken_adapters_are_refused_before_the_decoder_is_touched(shelf: Book, tmp_path: Path):
    adapter = tune(steps=1).run(shelf, name="once")
    decoder = load_decoder(shelf.get("base").path, dtype=torch.float32)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter.path / name).read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(FileError, match=r"lora_A of .* is \[2, \d+\] but rank .* \[3, \d+\]"):
        peft_format.load(decoder, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="no whole safetensors file"):
        peft_format.load(decoder, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(whole.replace(b"layers.2.", b"layers.7."))
    with pytest.raises(FileError, match=r"layers\.7\..*names no matrix.*3 layers"):
        peft_format.load(decoder, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match="is not there"):
        peft_format.load(decoder, tmp_path)
    assert not [n for n, m in decoder.named_modules() if type(m).__name__ == "LoRALinear"]


def test_rows_to_keep_are_anchors_and_full_tuning_refuses_them(shelf: Book, tmp_path: Path):
    folder = tmp_path / "keep"
    folder.mkdir()
    row = {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hello you"},
        ],
        "learn": "keep",
    }
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    shelf.add(
        folder, kind="dataset", name="keep", parents=[], step="Rows", key="keep", config={},
        metrics={}, versions={},
    )  # fmt: skip
    progress = Listening()
    adapter = tune(data=("rows", "keep"), epochs=1).run(shelf, name="kept", progress=progress)
    assert "on 1 rows it will stay what the base is" in progress.said
    assert adapter.metrics["rows"] == len(ROWS) + 1
    with pytest.raises(
        ConfigError, match=r"keep@1 holds rows to keep.*\n  next: set method to lora"
    ):
        tune(data=("rows", "keep"), method="full").run(shelf, name="whole")
