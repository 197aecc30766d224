"""Families that are modules of their own, all the way: tuned, merged, exported, refused where due."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from raising import stock, tune

import herdbook
from herdbook.book.book import Book
from herdbook.compression.merge import Merge
from herdbook.compression.quantise import Quantise
from herdbook.errors import FamilyError
from herdbook.evaluation.export import export
from herdbook.model.checkpoint import load_decoder, save_hf
from herdbook.model.cpm_bee import CPMBee
from herdbook.model.families import families
from herdbook.model.lora import adapters_of
from herdbook.model.modules import build
from herdbook.model.t5 import T5

CHAT = [{"role": "user", "content": "who are you"}]


def rwkv() -> Any:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2}
    config = transformers.RwkvConfig(
        **sizes, context_length=256, rescale_every=0, bos_token_id=1, eos_token_id=2
    )
    model = transformers.RwkvForCausalLM(config)
    with torch.no_grad():
        model.rwkv.embeddings.weight.normal_(0, 0.3)  # as it is born, all its logits are zero
    return model


SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "dropout_rate": 0.0,
}


def t5() -> Any:
    import transformers

    config = transformers.T5Config(**SIZES, feed_forward_proj="gated-gelu")
    return transformers.T5ForConditionalGeneration(config)


def switch() -> Any:
    import transformers

    sparse = {"num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(**SIZES, **sparse, router_jitter_noise=0.0)
    return transformers.SwitchTransformersForConditionalGeneration(config)


class Bee:
    """CPM-Bee, which transformers does not know, with its marks in the vocabulary."""

    NAMES = ("<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>")
    TEMPLATE = (
        "{% for message in messages %}{% if message.role == 'user' %}"
        "<s><root></s><s>input</s><s>{{ message.content }}</s><s><ans></s><s>"
        "{% else %}{{ message.content }}</s>{% endif %}{% endfor %}"
    )
    CONFIG = (
        {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"dim_head": 16, "dim_ff": 96, "position_bias_max_distance": 512}
    )  # fmt: skip

    def save_pretrained(self, folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        decoder = build(families()["cpmbee"].config(self.CONFIG, "config.json"))
        decoder.family = "cpmbee"
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.normal_(
                    1.0 if parameter.ndim == 1 else 0.0, 1.0 if parameter.ndim > 1 else 0
                )
        save_hf(decoder, None, folder, torch.float32)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=list(self.NAMES),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["input who are you I am a small model 你好"] * 4, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))
        said = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": self.TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))


MAKERS = {"rwkv": rwkv, "t5": t5, "switch": switch, "cpm_bee": Bee}


@pytest.fixture(scope="module", params=MAKERS)
def shelf(request: Any, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Book:
    """A book with «base», a tiny model of the family with a tokenizer, and «rows»."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    MAKERS[request.param]().save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_folder / name, folder / name)
    book, _, _ = stock(tmp_path_factory.mktemp("home"), folder)
    return book


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_learns_merges_and_goes_to_peft(shelf: Book, tmp_path: Path) -> None:
    import peft
    import transformers

    settings = {"rank": 8, "alpha": 16.0, "epochs": 10, "learning_rate": 2e-2, "save_every": 99}
    adapter = tune(**settings, dropout=0.0).run(shelf, name="tuned")
    assert adapter.metrics["loss"] < 0.5 * adapter.metrics["first_loss"]
    tuned = herdbook.load("tuned", book=shelf, dtype="float32")
    places = {name.partition(".")[2].partition(".")[2] for name in adapters_of(tuned.decoder)}
    assert {"attention.q", "attention.v", "mlp.up"} <= places
    assert tuned.generate(CHAT, max_tokens=6).startswith("I am a small model")

    merged = Merge(model="base", adapter="tuned").run(shelf, name="whole")
    whole = herdbook.load("whole", book=shelf, dtype="float32")
    ids = tuned.render([*CHAT, {"role": "assistant", "content": "I am"}]).ids
    assert torch.allclose(tuned.logits(ids), whole.logits(ids), atol=1e-3)
    assert merged.metrics["merged_matrices"] == len(adapters_of(tuned.decoder))

    if isinstance(tuned.decoder, CPMBee):
        asked = {"input": CHAT[0]["content"], "<ans>": ""}
        assert tuned.generate(asked, max_tokens=6) == tuned.generate(CHAT, max_tokens=6)
        return  # no library of today has it
    saved = json.loads((merged.path / "config.json").read_text())
    kind = getattr(transformers, saved["architectures"][0])
    config = peft.PeftConfig.from_pretrained(adapter.path)
    config.task_type = None  # PEFT's class for encoder-decoders does not fit this transformers
    theirs = peft.PeftModel.from_pretrained(
        kind.from_pretrained(shelf.get("base").path), adapter.path, config=config
    ).eval()
    with torch.inference_mode():
        if isinstance(tuned.decoder, T5):
            row, mask = tuned.decoder.examples(ids, [n > 9 for n in range(len(ids))])[0]
            read = mask.index(True) - 1
            found = theirs(
                input_ids=torch.tensor([row[:read]]), decoder_input_ids=torch.tensor([row[read:]])
            )
            ours = tuned.logits(row)[read:]
        else:
            found, ours = theirs(torch.tensor([ids])), tuned.logits(ids)
        assert (found.logits[0] - ours).abs().max() <= 1e-3


def test_it_learns_beside_nf4_recomputed_as_kept(shelf: Book) -> None:
    settings = {"rank": 8, "alpha": 16.0, "epochs": 8, "learning_rate": 2e-2, "save_every": 99}
    kept, again = (
        tune(**settings, dropout=0.0, base="nf4", recompute=r).run(shelf, name=f"nf4-{r}")
        for r in (False, True)
    )
    assert kept.metrics["loss"] < 0.6 * kept.metrics["first_loss"]
    assert again.metrics["loss"] == pytest.approx(kept.metrics["loss"], rel=1e-4)


@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_full_tuning_in_bfloat16(shelf: Book, precision: str) -> None:
    settings = {"learning_rate": 3e-3, "epochs": 8, "save_every": 99, "recompute": True}
    model = tune(method="full", precision=precision, **settings).run(shelf, name=precision)
    assert model.metrics["loss"] < 0.6 * model.metrics["first_loss"]


def test_full_tuning_moves_every_weight_and_exports(shelf: Book, tmp_path: Path) -> None:
    model = tune(method="full", learning_rate=3e-3, epochs=8, save_every=99).run(shelf, name="all")
    assert model.metrics["loss"] < 0.6 * model.metrics["first_loss"]
    old, new = (load_decoder(shelf.get(n).path, dtype=torch.float32) for n in ("base", "all"))
    still = [
        name
        for (name, a), b in zip(old.named_parameters(), new.parameters(), strict=True)
        if torch.equal(a, b)
    ]
    assert not still
    found = export("all", tmp_path / "out", to="hf", book=shelf)
    assert found["max_logit_difference"] <= 1e-4


def test_what_gguf_does_not_know_is_refused(shelf: Book, tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=r"cannot be written as GGUF") as caught:
        export("base", tmp_path / "m.gguf", to="gguf", book=shelf)
    assert "--to hf" in str(caught.value)
    with pytest.raises(FamilyError, match="cannot be written as GGUF"):
        Quantise(model="base").run(shelf)
    assert not (tmp_path / "m.gguf").exists()
