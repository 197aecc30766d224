"""The Python door: herdbook.load on everything that it takes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import herdbook
from herdbook.book.book import Book
from herdbook.data.records import Message
from herdbook.data.teacher import Ask
from herdbook.engine.loaded import LoadedModel
from herdbook.engine.request import Request
from herdbook.errors import CapacityError, ConfigError, FileError, RequestError, UnknownName
from herdbook.model.checkpoint import load_decoder
from herdbook.model.layout import Packed
from herdbook.model.lora import apply_lora, merge_lora
from herdbook.training import peft_format

from .conftest import naive

CHAT = [{"role": "user", "content": "hello who are you"}]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LoadedModel:
    return herdbook.load(str(tiny_folder), dtype="float32")


def in_the_middle(text: str) -> tuple[str, str]:
    """Two characters that first come after others, and what comes before them."""
    at = next(at for at in range(1, len(text) - 1) if text.index(text[at : at + 2]) == at)
    return text[:at], text[at : at + 2]


def test_a_template_of_ones_choice_and_its_stops(
    model: LoadedModel, tiny_folder: Path, tmp_path: Path
) -> None:
    """A text that ends turns ends replies to messages, and nothing else."""
    chat = [{"role": "user", "content": "你好"}]
    whole = model.generate(chat, max_tokens=24)
    cut, stop = in_the_middle(whole)
    file = tmp_path / "mine.jinja"
    says = "{%- set stop_strings = [" + repr(stop) + "] -%}"
    file.write_text(says + str(model.tokenizer.chat_template), encoding="utf-8")
    own = herdbook.load(str(tiny_folder), dtype="float32", template=str(file))
    assert own.render(chat, reply=True) == model.render(chat, reply=True)
    assert own.generate(chat, max_tokens=24) == cut
    assert "".join(own.stream(chat, max_tokens=24)) == cut
    (answer,) = own.as_teacher().generate([Ask((Message(**chat[0]),), max_tokens=24)])
    assert (answer.text, answer.finished) == (cut, True)
    ids = own.render(chat, reply=True).ids
    assert own.generate(ids, max_tokens=24) == whole
    assert own.generate(chat, max_tokens=24, stop=whole[:2]) == "", "the caller's stops count too"


def test_a_template_by_name(tiny_folder: Path) -> None:
    own = herdbook.load(str(tiny_folder), template="koala")
    text = own.tokenizer.decode(own.render(CHAT, reply=True).ids)
    assert text.endswith("BEGINNING OF CONVERSATION: USER: hello who are you GPT:")
    with pytest.raises(UnknownName, match="template 'kaola' is none that comes with Herdbook"):
        herdbook.load("never looked for", template="kaola")


def test_who_talks_is_told_todays_date_and_data_steps_are_not(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher's answers and training rows must not hang on the day they are made."""
    file = tmp_path / "dated.jinja"
    file.write_text("{{ strftime_now('%Y') }} {{ messages[0].content }}", encoding="utf-8")
    own = herdbook.load(str(tiny_folder), dtype="float32", template=str(file))
    asked: list[str] = []

    def noted(requests: list[Request]) -> list[Any]:
        asked.extend(own.tokenizer.decode(request.ids) for request in requests)
        return generate(requests)

    generate = own.engine.generate
    monkeypatch.setattr(own.engine, "generate", noted)
    own.generate(CHAT, max_tokens=1)
    own.as_teacher().generate([Ask((Message(**CHAT[0]),), max_tokens=1)])
    text = CHAT[0]["content"]
    assert asked == [f"{datetime.now():%Y} {text}", f"2024 {text}"]
    assert own.tokenizer.decode(own.render(CHAT, reply=True).ids) == f"2024 {text}"


def test_importing_herdbook_costs_nothing() -> None:
    code = "import sys, herdbook; print('torch' in sys.modules, herdbook.__version__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", herdbook.__version__]
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        herdbook.lod  # noqa: B018


def test_logits_and_hidden(model: LoadedModel) -> None:
    ids = model.tokenizer.encode("hello who are you")
    hidden, logits = model.hidden(ids), model.logits(ids)
    assert hidden.shape == (len(ids), 64) and hidden.dtype == torch.float32
    assert logits.shape == (len(ids), 384) and logits.dtype == torch.float32
    with torch.no_grad():
        straight = model.decoder(torch.tensor(ids), Packed([len(ids)]))
    assert torch.equal(hidden, straight)
    assert torch.equal(logits, model.decoder.logits(straight))
    assert not hidden.is_inference()  # may be used in anything


def test_generate_takes_messages_text_and_ids(model: LoadedModel) -> None:
    text = "hello who are"
    ids = model.tokenizer.encode(text)
    chat = model.render(CHAT, reply=True).ids
    for prompt, as_ids in (
        (text, ids),
        (ids, ids),
        (CHAT, chat),
        ([Message("user", "hello who are you")], chat),
    ):
        expected = naive(model.decoder, as_ids, 9)
        found = model.generate(prompt, max_tokens=9, ignore_eos=True)
        assert found == model.tokenizer.decode(expected)


def test_many_prompts_at_once(model: LoadedModel) -> None:
    prompts = ["hello", "who are you", CHAT]
    together = model.generate(prompts, max_tokens=7)
    assert together == [model.generate(one, max_tokens=7) for one in prompts]
    assert model.generate([CHAT, CHAT[:1]], max_tokens=7) == [together[2]] * 2


def test_streamed_equals_whole(model: LoadedModel) -> None:
    settings = {"max_tokens": 30, "temperature": 1.0, "seed": 4}
    parts = list(model.stream("hello", **settings))
    assert len(parts) > 1
    assert "".join(parts) == model.generate("hello", **settings)


def test_sampling_settings_are_checked(model: LoadedModel) -> None:
    with pytest.raises(RequestError, match=r"(?s)temprature=1 .*did you mean 'temperature'"):
        model.generate("hello", temprature=1)
    with pytest.raises(RequestError, match="max_tokens=0 must be a whole number"):
        model.stream("hello", max_tokens=0)
    with pytest.raises(CapacityError, match=r"prompt of 600 tokens .* context is 512 tokens"):
        model.generate([1] * 600)
    with pytest.raises(RequestError, match="from 0 to 383"):
        model.logits([384])
    with pytest.raises(RequestError, match="0 token ids"):
        model.hidden([])


def test_a_teacher_answers_in_order(model: LoadedModel) -> None:
    asks = [Ask((Message("user", text),), max_tokens=5) for text in ("hello", "who", "hello")]
    teacher = model.as_teacher()
    answers = teacher.generate(asks)
    single = [model.generate(ask.messages, max_tokens=5) for ask in asks]
    assert [answer.text for answer in answers] == single
    assert answers[0] == answers[2] and not answers[0].finished
    hits = model.engine.stats()["cached_tokens"]
    assert teacher.generate(asks[:1]) == answers[:1]
    assert model.engine.stats()["cached_tokens"] == hits  # nothing kept from the call before


def test_quantised_gguf(tiny_folder: Path, tmp_path: Path) -> None:
    from herdbook.model.checkpoint import save_gguf
    from herdbook.model.layers import Int8Linear
    from herdbook.tokens.tokenizer import Tokenizer

    file = tmp_path / "tiny.gguf"
    source = load_decoder(tiny_folder, dtype=torch.float32)
    save_gguf(source, Tokenizer.load(tiny_folder), file, "Q8_0")
    dense = herdbook.load(str(file), dtype="float32", quantised=False)
    blocks = herdbook.load(file, dtype=torch.float32)
    ids = dense.tokenizer.encode("hello who are you")
    assert isinstance(blocks.decoder.get_submodule("blocks.0.mlp.gate"), Int8Linear)
    assert torch.allclose(dense.logits(ids), blocks.logits(ids), atol=1e-3)
    # the engine over quantised layers still equals naive decoding over them
    reply = blocks.generate(ids, max_tokens=8, ignore_eos=True)
    assert reply == blocks.tokenizer.decode(naive(blocks.decoder, ids, 8))


def copy(folder: Path, to: Path, *leave_out: str) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*leave_out))
    return to


def test_without_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    bare = copy(tiny_folder, tmp_path / "bare", "tokenizer*", "special*", "*.jinja")
    model = herdbook.load(str(bare), dtype="float32")
    assert model.logits([1, 2, 3]).shape == (3, 384)
    with pytest.raises(FileError, match=r"(?s)bare came without a tokenizer.*next: put its"):
        model.generate("hello")
    with pytest.raises(FileError, match="without a tokenizer"):
        model.render(CHAT)
    assert model.generate([1, 2, 3], max_tokens=3) == ""
    assert model.maybe_tokenizer is None


def test_without_head(tiny_folder: Path, tmp_path: Path) -> None:
    bare = copy(tiny_folder, tmp_path / "headless")
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    model = herdbook.load(str(bare), dtype="float32")
    assert model.hidden([1, 2, 3]).shape == (3, 64)
    for ask in (lambda: model.logits([1]), lambda: model.generate([1])):
        with pytest.raises(FileError, match="no head"):
            ask()


def test_a_tokenizer_larger_than_the_embedding(tiny_folder: Path, tmp_path: Path) -> None:
    bad = copy(tiny_folder, tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:100].clone()
    save_file(weights, bad / "model.safetensors")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(FileError, match=r"tokenizer has \d+ ids but .* only 100 rows"):
        herdbook.load(str(bad))


def test_unknown_references_and_types(home: Path, tiny_folder: Path) -> None:
    with pytest.raises(UnknownName, match="'lunna' is no model"):
        herdbook.load("lunna")
    with pytest.raises(ConfigError, match=r"(?s)dtype='float23' is not known.*'float32'"):
        herdbook.load(str(tiny_folder), dtype="float23")


def make_adapter(tiny_folder: Path, folder: Path, base: str) -> torch.Tensor:
    """A random adapter; returns the logits of its base with it merged."""
    decoder = load_decoder(tiny_folder, dtype=torch.float32)
    adapters = apply_lora(decoder, targets=("q", "v", "down"), rank=2, alpha=4.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.B.normal_(0, 0.1, generator=generator)
    folder.mkdir()
    peft_format.save(decoder, folder, base=base)
    with torch.no_grad():
        merge_lora(decoder)
        return decoder.logits(decoder(torch.tensor([5, 6, 7]), Packed([3])))


def test_an_adapter_folder(tiny_folder: Path, tmp_path: Path) -> None:
    merged = make_adapter(tiny_folder, tmp_path / "adapter", str(tiny_folder))
    model = herdbook.load(str(tmp_path / "adapter"), dtype="float32")
    assert torch.allclose(model.logits([5, 6, 7]), merged, atol=1e-4)
    base = herdbook.load(str(tiny_folder), dtype="float32")
    assert not torch.allclose(base.logits([5, 6, 7]), merged, atol=1e-2)
    assert model.generate(CHAT, max_tokens=4) == model.tokenizer.decode(
        [i for i in naive(model.decoder, model.render(CHAT, reply=True).ids, 4)]
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match="does not name its base model"):
        herdbook.load(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(FileError, match="is no JSON object"):
        herdbook.load(str(tmp_path / "adapter"))


def test_names_of_the_book(book: Book, tiny_folder: Path, tmp_path: Path) -> None:
    def enter(source: Path, kind: str, name: str, parents: list[str]) -> str:
        out = copy(source, tmp_path / f"out-{name}")
        return book.add(
            out, kind=kind, name=name, parents=parents, step="Test", key=name,
            config={}, metrics={}, versions={},
        ).id  # fmt: skip

    base = enter(tiny_folder, "model", "luna", [])
    merged = make_adapter(tiny_folder, tmp_path / "adapter", base)
    enter(tmp_path / "adapter", "adapter", "luna-tune", [base])
    plain = herdbook.load("luna", dtype="float32")
    assert plain.logits([5, 6, 7]).shape == (3, 384)
    for ref in ("luna-tune", str(book.get("luna-tune").path)):  # by name, and by its folder
        tuned = herdbook.load(ref, dtype="float32")
        assert torch.allclose(tuned.logits([5, 6, 7]), merged, atol=1e-4)
        assert tuned.tokenizer.encode("hello") == plain.tokenizer.encode("hello")
