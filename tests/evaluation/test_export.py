"""What other tools get: the same model, or nothing at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from herdbook.book.book import Artifact, Book
from herdbook.compression.quantise import Quantise
from herdbook.engine.loading import load
from herdbook.errors import ConfigError, FileError, GateError, UnknownName
from herdbook.evaluation import export as module
from herdbook.evaluation.export import export
from herdbook.files import gguf
from herdbook.model.checkpoint import load_decoder, save_gguf, save_hf
from herdbook.model.fetch import Fetch
from herdbook.model.layers import Int4Linear, Int8Linear
from herdbook.model.lora import merge_lora, put_adapter
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import peft_format

TEXT = "who are you? 你是谁 12"


@pytest.fixture
def tiny(book: Book, tiny_folder: Path) -> Artifact:
    return Fetch(str(tiny_folder)).run(book, name="tiny")


@pytest.fixture
def quantised(tiny: Artifact, book: Book, tmp_path: Path) -> Artifact:
    """A Q4_1 file made from «tiny»."""
    desk = tmp_path / "desk"
    desk.mkdir()
    tokenizer = Tokenizer.load(tiny.path)
    save_gguf(load_decoder(tiny.path, torch.float32), tokenizer, desk / "model.gguf", "Q4_1")
    return enter(book, desk, "four", "model", [tiny])


@pytest.fixture
def adapter(tiny: Artifact, book: Book, tmp_path: Path) -> Artifact:
    desk = tmp_path / "adapter"
    desk.mkdir()
    decoder = load_decoder(tiny.path, torch.float32)
    put_adapter(decoder, "blocks.0.attention.q", 2, 4.0)
    peft_format.save(decoder, desk, base=tiny.id)
    return enter(book, desk, "tuned", "adapter", [tiny])


def enter(book: Book, desk: Path, name: str, kind: str, parents: list[Artifact]) -> Artifact:
    return book.add(
        desk, kind=kind, name=name, parents=[one.id for one in parents], step="Made",
        key=f"sha256:{name}", config={}, metrics={}, versions={},
    )  # fmt: skip


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_a_quantised_folder_goes_as_it_is(
    format: str, tiny: Artifact, book: Book, tmp_path: Path
) -> None:
    made = Quantise(model="tiny", format=format).run(book, name="folder")
    found = export("folder", tmp_path / "hf", to="hf", book=book)
    assert found["format"] == "as it is" and found["max_logit_difference"] == 0
    weights = (tmp_path / "hf" / "model.safetensors").read_bytes()
    assert weights == (made.path / "model.safetensors").read_bytes()
    kept = load(str(tmp_path / "hf"), dtype="float32")
    kind = Int4Linear if format == "int4" else Int8Linear
    assert isinstance(kept.decoder.blocks[0].mlp.up, kind)
    assert kept.logits([5, 6, 7]).isfinite().all()
    export("folder", tmp_path / "x.gguf", to="gguf", book=book)
    with pytest.raises(ConfigError, match=r"quantised already .*\n.*export tiny@1 instead"):
        export("folder", tmp_path / "y.gguf", to="gguf", quant="Q8_0", book=book)
    entered = Fetch(str(tmp_path / "hf")).run(book, name="fetched")
    assert entered.metrics["parameters"] == made.metrics["parameters"]


def test_a_hugging_face_folder(tiny: Artifact, book: Book, tmp_path: Path) -> None:
    """transformers itself loads it, ids and logits as the original's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = export("tiny", tmp_path / "deep" / "hf", to="hf", book=book)
    assert found["max_logit_difference"] == 0.0 and found["top1_agreement_share"] == 1.0
    original = load("tiny", book=book, dtype="float32")
    ids = original.tokenizer.encode(TEXT)
    folder = str(tmp_path / "deep" / "hf")
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == ids
    theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(original.logits(ids), theirs, atol=1e-4, rtol=1e-4)
    assert [one.name for one in (tmp_path / "deep").iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("quant", "stored", "most"),
    [("F32", "F32", 0.0), ("F16", "F16", 0.05), ("", "F16", 0.05), ("Q8_0", "Q8_0", 1.0)],
)
def test_a_gguf_file(
    tiny: Artifact, book: Book, tmp_path: Path, quant: str, stored: str, most: float
) -> None:
    path = tmp_path / "luna.gguf"
    found = export("tiny", path, to="gguf", quant=quant, book=book)
    assert found["format"] == stored
    assert found["max_logit_difference"] <= most
    assert found["size_bytes"] == path.stat().st_size
    file = gguf.read(path)
    assert file.metadata["general.name"] == "luna"
    assert file.tensors["blk.0.attn_q.weight"].type == stored
    assert load(str(path)).tokenizer.encode(TEXT) == Tokenizer.load(tiny.path).encode(TEXT)


def test_a_gguf_file_is_copied_as_it_is(quantised: Artifact, book: Book, tmp_path: Path) -> None:
    found = export("four", tmp_path / "copy.gguf", to="gguf", book=book)
    assert found["format"] == "as it is"
    original = (quantised.path / "model.gguf").read_bytes()
    assert (tmp_path / "copy.gguf").read_bytes() == original
    export(str(tmp_path / "copy.gguf"), tmp_path / "again.gguf", to="gguf", book=book)
    assert (tmp_path / "again.gguf").read_bytes() == original
    export("four", tmp_path / "wide.gguf", to="gguf", quant="F16", book=book)
    assert gguf.read(tmp_path / "wide.gguf").tensors["blk.0.attn_q.weight"].type == "F16"


@pytest.mark.parametrize("window", [7, None])
def test_what_llama_cpp_leaves_out_is_said(
    window: int | None, tiny_folder: Path, book: Book, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "mistral"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": window}
    (folder / "config.json").write_text(json.dumps(config))
    found = export(str(folder), tmp_path / "m.gguf", to="gguf", book=book)
    copied = export(str(tmp_path / "m.gguf"), tmp_path / "copy.gguf", to="gguf", book=book)
    for one in (found, copied):
        assert ("past 7 tokens its replies differ" in one.get("note", "")) == bool(window)


def test_nothing_is_quantised_twice(quantised: Artifact, book: Book, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"four is quantised .*\n.*or export tiny@1 instead"
    ) as told:
        export("four", tmp_path / "x.gguf", to="gguf", quant="Q8_0", book=book)
    assert told.value.exit_code == 2
    shutil.copyfile(quantised.path / "model.gguf", tmp_path / "lone.gguf")
    with pytest.raises(ConfigError, match=r"next: leave --quant out$"):
        lone, target = str(tmp_path / "lone.gguf"), tmp_path / "y.gguf"
        export(lone, target, to="gguf", quant="Q4_0", book=book)


def test_the_adapter_that_a_model_was_tuned_with(
    adapter: Artifact, book: Book, tmp_path: Path
) -> None:
    desk = Path(shutil.copytree(book.get("tiny").path, tmp_path / "merged"))
    (desk / "LICENSE").touch()
    enter(book, desk, "merged", "model", [book.get("tiny"), adapter])
    for ref in ("merged", "tuned"):
        target = tmp_path / f"{ref}-peft"
        found = export(ref, target, to="peft", book=book)
        assert (found["adapter"], found["base"]) == ("tuned@1", "tiny@1")
        assert ("max_logit_difference" in found) == (ref == "merged")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (target / name).read_bytes() == (adapter.path / name).read_bytes()
    with pytest.raises(UnknownName, match="'tiny' has no adapter among its ancestors"):
        export("tiny", tmp_path / "none", to="peft", book=book)
    with (adapter.path / "adapter_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(FileError, match="was changed\n  next: herd verify"):
        export("merged", tmp_path / "changed", to="peft", book=book)
    assert not (tmp_path / "changed").exists()


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_an_adapter_is_no_model(
    adapter: Artifact, book: Book, tmp_path: Path, to: Any, tiny_folder: Path
) -> None:
    with pytest.raises(UnknownName, match="'tuned' is of the kind adapter where a model is wanted"):
        export("tuned", tmp_path / "x.gguf", to=to, book=book)
    lone = Path(shutil.copytree(adapter.path, tmp_path / "lone"))
    config = json.loads((lone / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tiny_folder)
    (lone / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is an adapter on its base"):
        export(str(lone), tmp_path / "x.gguf", to=to, book=book)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("there", {"to": "hf"}, "there is there already"),
        ("x", {"to": "gguf"}, r"x does not end in .gguf\n  next: x.gguf"),
        ("x.gguf", {"to": "gguf", "quant": "Q8"}, r"--quant Q8 is not known\n  next: .*'Q8_0'"),
        ("x", {"to": "hf", "quant": "F16"}, "--quant F16 belongs to --to gguf"),
    ],
)
def test_what_cannot_be(book: Book, tmp_path: Path, name: str, keys: Any, message: str) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(ConfigError, match=message):
        export("tiny", tmp_path / name, book=book, **keys)


def test_what_says_something_else_is_not_handed_out(
    tiny: Artifact, book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = module.save_hf

    def spoilt(decoder: Any, *rest: Any) -> None:
        weight = decoder.blocks[0].mlp.down.weight
        weight += 0.01
        save(decoder, *rest)
        weight -= 0.01

    monkeypatch.setattr(module, "save_hf", spoilt)
    with pytest.raises(GateError, match="logits of hf differ by"):
        export("tiny", tmp_path / "hf", to="hf", book=book)
    assert not list(tmp_path.glob("*hf*")), "neither it nor anything half-done"


def test_an_adapter_that_the_merged_model_does_not_say_is_not_handed_out(
    tiny: Artifact, book: Book, tmp_path: Path
) -> None:
    desk = tmp_path / "adapter"
    desk.mkdir()
    decoder = load_decoder(tiny.path, torch.float32)
    torch.nn.init.normal_(put_adapter(decoder, "blocks.0.attention.q", 2, 4.0).B)
    torch.nn.init.normal_(decoder.blocks[0].attention.q.A)
    peft_format.save(decoder, desk, base=tiny.id)
    tuned = enter(book, desk, "tuned", "adapter", [tiny])
    merge_lora(decoder)
    save_hf(decoder, Tokenizer.load(tiny.path), tmp_path / "right", torch.float32)
    enter(book, tmp_path / "right", "right", "model", [tiny, tuned])
    found = export("right", tmp_path / "good", to="peft", book=book)
    assert found["max_logit_difference"] < 1e-3
    wrong = Path(shutil.copytree(tiny.path, tmp_path / "wrong"))  # as if nothing had been merged
    (wrong / "LICENSE").touch()
    enter(book, wrong, "wrong", "model", [tiny, tuned])
    with pytest.raises(GateError, match="logits of bad differ"):
        export("wrong", tmp_path / "bad", to="peft", book=book)
    assert not (tmp_path / "bad").exists()
