"""LoRA beside weights in few bits: the file's own (exact), and NF4."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from raising import Place, stock, tune
from test_loop import PLAN, rows

from herdbook.book.book import Book
from herdbook.compression.layers import quantise_layers
from herdbook.compression.merge import Merge
from herdbook.compression.quantise import Quantise
from herdbook.errors import ConfigError
from herdbook.model.checkpoint import load_decoder, save_compressed, save_gguf
from herdbook.model.decoder import Decoder
from herdbook.model.layers import Int4Linear, Int8Linear
from herdbook.model.lora import apply_lora
from herdbook.model.nf4 import NF4Linear
from herdbook.progress import Progress
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import loop, peft_format
from herdbook.training.objective import NextToken


@pytest.fixture(scope="module")
def packaged(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in 4 and 8 bits, as a GGUF and as a folder."""
    home = tmp_path_factory.mktemp("packaged")
    tokenizer = Tokenizer.load(tiny_folder)
    made: dict[str, Path] = {}
    for bits, quant in ((4, "Q4_1"), (8, "Q8_0")):
        decoder = load_decoder(tiny_folder, dtype=torch.float32)
        made[quant] = home / quant
        made[quant].mkdir()
        save_gguf(decoder, tokenizer, made[quant] / "model.gguf", quant)
        quantise_layers(decoder, bits)
        made[f"int{bits}"] = home / f"int{bits}"
        save_compressed(decoder, tokenizer, made[f"int{bits}"], lambda name: torch.float32)
    return made


def losses(decoder: Decoder, work: Path, **adapter: object) -> list[float]:
    settings = {"targets": ("q", "v", "down"), "rank": 4, "alpha": 8} | adapter
    adapters = apply_lora(decoder.train(), **settings)
    parameters = {f"{n}.{m}": getattr(a, m) for n, a in adapters.items() for m in ("A", "B")}
    data = [replace(row, ids=[3 + one for one in row.ids]) for row in rows()]
    state = loop.train(NextToken(decoder), parameters, data, replace(PLAN, steps=8), work)
    return [record["loss"] for record in state.records]


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "int4", "int8"])
@pytest.mark.parametrize("adapter", [{}, {"group": 32}, {"dropout": 0.2}, {"last_layers": 1}])
def test_beside_packaged_weights_as_beside_the_same_ones_dense(
    packaged: dict[str, Path], kind: str, adapter: dict[str, object], tmp_path: Path
):
    kept = tune(base="packaged")._load(_artifact(packaged[kind]), torch.float32)
    few = [m for m in kept.modules() if isinstance(m, Int4Linear | Int8Linear)]
    assert len(few) >= 21 and not any(isinstance(m, NF4Linear) for m in kept.modules())
    dense = load_decoder(packaged[kind], dtype=torch.float32)
    ours = losses(kept, tmp_path / "kept", **adapter)
    theirs = losses(dense, tmp_path / "dense", **adapter)
    assert ours == pytest.approx(theirs, abs=1e-5) and ours[-1] < ours[0]


def _artifact(folder: Path):
    class Source:
        path, ref = folder, "base@1"

    return Source()


def test_beside_nf4_as_beside_its_dense_twin(tiny_folder: Path, tmp_path: Path):
    kept = load_decoder(tiny_folder, dtype=torch.float32, nf4=True)
    dense = load_decoder(tiny_folder, dtype=torch.float32)
    for name, layer in kept.named_modules():
        if isinstance(layer, NF4Linear):
            twin = dense.get_submodule(name)
            assert 0 < (twin.weight - layer.plain()).norm() < 0.12 * twin.weight.norm()
            twin.weight.copy_(layer.plain())
    assert sum(isinstance(m, NF4Linear) for m in kept.modules()) == 21
    assert losses(kept, tmp_path / "kept") == pytest.approx(
        losses(dense, tmp_path / "dense"), abs=1e-5
    )


@pytest.fixture
def shelf(tmp_path: Path, packaged: dict[str, Path]) -> Book:
    book, _, _ = stock(tmp_path / "home", packaged["Q4_1"])
    return book


def test_the_adapter_says_what_it_learnt_beside_and_is_served_like_others(shelf: Book):
    plain = tune(dropout=0.0).run(shelf, name="plain")
    assert "base_kept" not in json.loads((plain.path / "adapter_config.json").read_text())
    for base in ("nf4", "packaged"):
        made = tune(base=base, dropout=0.0).run(shelf, name=base)
        config = json.loads((made.path / "adapter_config.json").read_text())
        assert config["base_kept"] == base and config["peft_type"] == "LORA"
        assert config["base_computed"] in ("bfloat16", "float32")
        assert made.metrics["weights_bytes"] < 0.6 * plain.metrics["weights_bytes"]
        assert made.metrics["loss"] < made.metrics["first_loss"]
        merged = Merge(model="base", adapter=made.ref).run(shelf, name=f"{base}-merged")
        assert merged.metrics["merged_matrices"] == 21


def test_merged_is_what_was_trained_beside_nf4_and_what_else_is_told(
    shelf: Book, packaged: dict[str, Path]
):
    class Listening(Progress):
        said = ""

        def say(self, text: str) -> None:
            self.said += text

    made = tune(base="nf4", dropout=0.0).run(shelf, name="on-nf4")
    progress = Listening()
    merged = Merge(model="base", adapter=made.ref).run(shelf, progress=progress)
    assert "merged into these; on the base's own it would say something else" in progress.said
    beside = load_decoder(packaged["Q4_1"], dtype=torch.float32, nf4=True)
    whole = load_decoder(merged.path, dtype=torch.float32)
    for name, adapter in peft_format.load(beside, made.path).items():
        trained = adapter.base.plain() + adapter.correction()
        torch.testing.assert_close(whole.get_submodule(name).weight, trained)


def test_a_grouped_adapter_beside_the_file_s_four_bits_goes_back_onto_its_grid(shelf: Book):
    grouped = tune(base="packaged", group=32, dropout=0.0, targets=("q", "v", "down"), epochs=4)
    grouped.run(shelf, name="grouped")
    merged = Merge(model="base", adapter="grouped").run(shelf, name="merged")
    four = Quantise(model=merged.ref).run(shelf, name="four")
    assert four.metrics["mean_kl"] < 1e-3 and four.metrics["exact_matrices"] == 21 - 9


def test_what_cannot_be(shelf: Book, tiny_folder: Path):
    Place(folder=str(tiny_folder)).run(shelf, name="float")
    with pytest.raises(
        ConfigError, match=r"float@1 keeps no matrix in 4 or 8 bits so.*\n.*base to nf4"
    ):
        tune(model="float", base="packaged").run(shelf)
    for also, beside in (({"method": "full"}, "full"), ({"dora": True}, "dora")):
        with pytest.raises(ConfigError, match=f"tune.base is nf4 beside {beside}"):
            tune(base="nf4", **also).run(shelf)
