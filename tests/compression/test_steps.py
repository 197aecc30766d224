"""Merging and quantising: what is served is what was trained, and it is checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from raising import Place, tune

from herdbook.book.book import Book
from herdbook.compression import int4, layers, merge, parity, quantise
from herdbook.compression.layers import quantise_layers
from herdbook.compression.merge import Merge
from herdbook.compression.quantise import Quantise
from herdbook.errors import ConfigError, FamilyError, GateError
from herdbook.files import gguf
from herdbook.model.checkpoint import load_decoder, save_compressed, save_gguf, save_hf
from herdbook.model.decoder import Decoder
from herdbook.model.families import families
from herdbook.model.layers import Int4Linear, Int8Linear, Linear
from herdbook.model.lora import merge_lora
from herdbook.progress import Progress
from herdbook.recipe import raise_
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import peft_format


def learnt(book: Book, ref: str) -> float:
    """Loss on the rows it was tuned on."""
    from herdbook.data import records
    from herdbook.tokens.chat import render
    from herdbook.tokens.packing import pack
    from herdbook.tokens.tokenizer import Tokenizer
    from herdbook.training.objective import NextToken

    artifact = book.get(ref)
    tokenizer = Tokenizer.load(artifact.path)
    kept = records.read(book.get("rows").path / "train.jsonl")
    rows = [render(tokenizer, row.messages) for row in kept]
    packs, _ = pack(rows, 4096)
    objective = NextToken(load_decoder(artifact.path, dtype=torch.float32))
    with torch.no_grad():
        total = sum(float(objective.loss(one)) for one in packs)
    return total / sum(objective.weight(one) for one in packs)


def test_merged_is_base_plus_correction_and_originals_stay(raised: Book):
    before = {p: p.read_bytes() for p in raised.get("base").path.iterdir()}
    merged = Merge(model="base", adapter="plain").run(raised, name="merged")
    assert merged.metrics["max_logit_difference"] < 1e-3
    assert merged.metrics["top1_agreement_share"] == 1.0
    assert merged.metrics["merged_matrices"] == 9
    decoder = load_decoder(raised.get("base").path, dtype=torch.float32)
    old = decoder.blocks[1].mlp.down.weight.clone()
    adapters = peft_format.load(decoder, raised.get("plain").path)
    wanted = old + adapters["blocks.1.mlp.down"].correction()
    saved = load_decoder(merged.path, dtype=torch.float32)
    torch.testing.assert_close(saved.blocks[1].mlp.down.weight, wanted)
    assert not torch.allclose(wanted, old)
    assert {p: p.read_bytes() for p in raised.get("base").path.iterdir()} == before
    assert not list(raised.verify()[1])
    merge_lora(decoder)


def test_half_the_bytes_in_bfloat16(raised: Book):
    full = Merge(model="base", adapter="plain").run(raised)
    half = Merge(model="base", adapter="plain", dtype="bfloat16").run(raised)
    assert half.metrics["size_bytes"] < 0.7 * full.metrics["size_bytes"]
    assert half.metrics["max_logit_difference"] > full.metrics["max_logit_difference"]


def test_a_merge_that_says_something_else_is_refused(raised: Book, monkeypatch):
    monkeypatch.setattr(merge, "merge_lora", lambda decoder: merge_lora(decoder) or spoil(decoder))

    def spoil(decoder):
        with torch.no_grad():
            decoder.blocks[0].mlp.down.weight += 0.01

    with pytest.raises(GateError, match="logits differ by"):
        Merge(model="base", adapter="grouped").run(raised, name="spoilt")
    assert raised.find("spoilt") is None


def test_an_adapter_goes_into_its_own_base_only(raised: Book, tmp_path: Path):
    shutil.copytree(raised.get("base").path, tmp_path / "other")
    (tmp_path / "other" / "note.txt").write_text("another artifact")
    Place(folder=str(tmp_path / "other")).run(raised, name="other")
    with pytest.raises(ConfigError, match=r"was trained on base@1 not on other@1\n.*into base@1"):
        Merge(model="other", adapter="plain").run(raised)
    with pytest.raises(ConfigError, match="base@1 is a model and only an adapter"):
        Merge(model="base", adapter="base").run(raised)
    with pytest.raises(ConfigError, match=r"plain@1 is an adapter .*\n.*merge the adapter"):
        Quantise(model="plain").run(raised)


def test_an_untuned_q4_1_model_goes_back_bit_by_bit(raised: Book):
    again = Quantise(model="base").run(raised, name="again")
    assert again.metrics["exact_matrices"] == again.metrics["matrices"] == 21
    assert again.metrics["max_logit_difference"] == 0.0
    old, new = (gguf.read(raised.get(n).path / "model.gguf") for n in ("base", "again"))
    for name in old.tensors:
        assert (old.raw(name) == new.raw(name)).all(), name


def test_a_grouped_adapter_survives_four_bits(raised: Book):
    merged = Merge(model="base", adapter="grouped").run(raised, name="grouped-merged")
    int4 = Quantise(model="grouped-merged").run(raised, name="grouped-int4")
    base, full, four = (learnt(raised, n) for n in ("base", "grouped-merged", "grouped-int4"))
    assert full < base - 0.3
    assert four == pytest.approx(full, abs=0.02)
    assert int4.metrics["mean_kl"] < 1e-3
    assert int4.metrics["exact_matrices"] == 21 - 9
    assert int4.metrics["size_bytes"] < 0.4 * merged.metrics["size_bytes"]


def test_a_plain_adapter_is_rounded(raised: Book):
    Merge(model="base", adapter="plain").run(raised, name="plain-merged")
    int4 = Quantise(model="plain-merged").run(raised, name="plain-int4")
    assert int4.metrics["exact_matrices"] == 21 - 9
    assert int4.metrics["mean_kl"] > 1e-3
    eight = Quantise(model="plain-merged", format="Q8_0").run(raised, name="plain-int8")
    assert eight.metrics["size_bytes"] > int4.metrics["size_bytes"]
    assert learnt(raised, "plain-int8") == pytest.approx(learnt(raised, "plain-merged"), abs=0.02)


def test_what_gguf_cannot_say_is_refused_before_the_work(
    raised: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A Falcon with ALiBi, which llama.cpp does not know."""
    tokenizer = Tokenizer.load(raised.get("base").path)
    source = {
        "model_type": "falcon",
        "vocab_size": tokenizer.size,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "alibi": True,
    }
    decoder = Decoder(families()["falcon"].config(source, "here"))
    decoder.family = "falcon"
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_hf(decoder, tokenizer, tmp_path / "rw", torch.float32)
    Place(folder=str(tmp_path / "rw")).run(raised, name="rw")
    monkeypatch.setattr(quantise, "round_to_q4_1", lambda *_: pytest.fail("this takes long"))
    with pytest.raises(FamilyError, match=r"cannot be written as GGUF.*\n.*--to hf"):
        Quantise(model="rw").run(raised, name="rw-int4")
    assert raised.find("rw-int4") is None


@pytest.fixture
def opt(raised: Book, tmp_path: Path) -> Book:
    """The book with «opt», of a family that GGUF does not know."""
    tokenizer = Tokenizer.load(raised.get("base").path)
    source = {
        "model_type": "opt",
        "vocab_size": tokenizer.size,
        "max_position_embeddings": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 80,
    }
    decoder = Decoder(families()["opt"].config(source, "here"))
    decoder.family = "opt"
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_hf(decoder, tokenizer, tmp_path / "opt", torch.float32)
    Place(folder=str(tmp_path / "opt")).run(raised, name="opt")
    return raised


@pytest.mark.parametrize(("format", "bits", "kl"), [("int4", 4, 0.1), ("int8", 8, 0.001)])
def test_a_family_without_gguf(opt: Book, format: str, bits: int, kl: float):
    with pytest.raises(FamilyError, match=r"cannot be written as GGUF.*\n.*int4 or int8"):
        Quantise(model="opt").run(opt, name=f"opt-{format}")
    made = Quantise(model="opt", format=format).run(opt, name=f"opt-{format}")
    assert made.metrics["matrices"] == 2 * 5, "the last of the MLP, of 80 inputs, stays"
    assert made.metrics["exact_matrices"] == 0
    assert 0 < made.metrics["mean_kl"] < kl
    assert 0 < made.metrics["rounding_share"] <= parity.ROUNDING[format] / 2
    assert made.metrics["size_bytes"] < 0.65 * sum(
        file.stat().st_size for file in opt.get("opt").path.glob("*.safetensors")
    )
    kept = load_decoder(made.path, torch.float32, quantised=True)
    assert isinstance(kept.blocks[1].attention.o, Int4Linear if bits == 4 else Int8Linear)
    assert not list(opt.verify()[1])
    again = Quantise(model=made.ref, format=format).run(opt, name=f"again-{format}")
    assert again.metrics["exact_matrices"] == again.metrics["matrices"] == 10
    assert again.metrics["mean_kl"] < 1e-6
    assert again.files["model.safetensors"] == made.files["model.safetensors"]


def test_a_recipe_is_refused_before_its_first_step(opt: Book, tmp_path: Path):
    """Where the base is at hand: GGUF would be known not to hold it only after the tuning."""
    text = f"""
about: {{en: words, zh: 词}}
settings: {{base: "{tmp_path / "opt"}", format: Q4_1}}
steps:
  base: {{do: Fetch, ref: $base}}
  tune: {{do: Tune, model: base, data: [rows], learning_rate: 0.01, steps: 1, pack: 64}}
  merge: {{do: Merge, model: base, adapter: tune}}
  small: {{do: Quantise, model: merge, format: $format}}
result: small
"""
    path = tmp_path / "opted.yaml"
    path.write_text(text.replace("[rows]", f"[{opt.get('rows').id}]"))
    before = len(opt.entries())
    for format in ("Q4_1", "Q8_0"):
        with pytest.raises(FamilyError, match=r"opt cannot be written as GGUF.*\n.*int4 or int8"):
            raise_(str(path), book=opt, format=format)
    assert len(opt.entries()) == before


def test_a_quantised_folder_is_tuned_on(raised: Book):
    """Its adapter is trained on, merged into and measured against the weights that the codes say."""
    Quantise(model="base", format="int4").run(raised, name="int4")
    tune(model="int4", dropout=0.0, epochs=4, targets=("q", "v", "down")).run(
        raised, name="on-int4"
    )
    merged = Merge(model="int4", adapter="on-int4").run(raised, name="on-int4-merged")
    assert merged.metrics["max_logit_difference"] < 1e-3
    assert learnt(raised, "on-int4-merged") < learnt(raised, "int4") - 0.3
    again = Quantise(model="on-int4-merged", format="int4").run(raised, name="on-int4-again")
    assert again.metrics["exact_matrices"] < again.metrics["matrices"]


def test_llama_as_a_folder_too(raised: Book):
    """Out of Q4_1, which has no zero points: rounded anew."""
    made = Quantise(model="base", format="int4").run(raised, name="folder")
    assert made.metrics["exact_matrices"] == 0 and made.metrics["matrices"] == 21
    assert made.metrics["mean_kl"] < 0.1
    eight = Quantise(model="base", format="int8").run(raised, name="folder8")
    assert eight.metrics["mean_kl"] < made.metrics["mean_kl"] / 20


@pytest.mark.parametrize("bits", [4, 8])
def test_a_scrambled_folder_is_no_rounding(tiny_folder: Path, tmp_path: Path, bits: int):
    decoder = load_decoder(tiny_folder, dtype=torch.float32)
    twin = load_decoder(tiny_folder, dtype=torch.float32)
    quantise_layers(twin, bits)
    save_compressed(twin, None, tmp_path, lambda name: torch.float32)
    parity.check_written(decoder, tmp_path, f"int{bits}")
    weight = decoder.blocks[1].attention.k.weight
    weight.copy_(weight.roll(1, 0))
    with pytest.raises(GateError, match=r"blocks\.1\.attention\.k\.weight .* is off by"):
        parity.check_written(decoder, tmp_path, f"int{bits}")


def test_four_bits_with_a_zero_point_are_as_near_as_q4_1():
    torch.manual_seed(0)
    for values in (torch.randn(64, 1024), torch.distributions.StudentT(5.0).sample((64, 1024))):
        layer = Linear(1024, 64)
        layer.weight.data = values
        found = (layers.rounded(layer, 4).dense(torch.float32) - values).norm()
        assert found <= 1.01 * (int4.nearest(values) - values).norm()


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_1", "Q4_0"])
def test_a_scrambled_tensor_is_no_rounding(tiny_folder: Path, tmp_path: Path, quant: str):
    """Rows of one matrix in another order: refused in every format, as its rounding is not."""
    decoder = load_decoder(tiny_folder, dtype=torch.float32)
    save_gguf(decoder, None, tmp_path / "good.gguf", quant)
    assert parity.check_written(decoder, tmp_path / "good.gguf", quant) <= parity.ROUNDING[quant]
    weight = decoder.blocks[1].attention.k.weight
    weight.copy_(weight.roll(1, 0))
    with pytest.raises(GateError, match=r"blocks\.1\.attention\.k\.weight .* is off by"):
        parity.check_written(decoder, tmp_path / "good.gguf", quant)


def test_a_merge_says_what_it_costs(raised: Book, tmp_path: Path):
    class Listening(Progress):
        said = ""

        def say(self, text: str) -> None:
            self.said += text

    progress = Listening()
    Merge(model="base", adapter="plain").run(raised, name="exact", progress=progress)
    assert not progress.said  # float32 into float32 loses nothing
    Merge(model="base", adapter="plain", dtype="float16").run(raised, progress=progress)
    assert "rounded to float16: the logits moved by up to" in progress.said

    # a base of 8 bits
    four = Quantise(model="exact", format="Q8_0").run(raised, name="eight")
    adapter = raised.get("plain")
    raised.add(
        shutil.copytree(adapter.path, tmp_path / "on-eight"), kind="adapter", name="on-eight",
        parents=[four.id], step="Tune", key="on-eight", config={}, metrics={}, versions={},
    )  # fmt: skip
    progress = Listening()
    merged = Merge(model="eight", adapter="on-eight").run(raised, progress=progress)
    assert merged.metrics["max_logit_difference"] < 1e-3
    assert "go on with Quantise" in progress.said and "in float32" in progress.said
