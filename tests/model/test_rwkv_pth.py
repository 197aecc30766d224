"""RWKV-4 as BlinkDL published it: a lone .pth file, the tokenizer beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from herdbook.book.book import Book
from herdbook.engine.loading import load
from herdbook.errors import FileError, HerdbookError
from herdbook.model.checkpoint import expected_shapes, load_decoder, open_checkpoint, save_hf
from herdbook.model.families import families
from herdbook.model.families.rwkv import blinkdl
from herdbook.model.fetch import Fetch
from herdbook.tokens.tokenizer import Tokenizer

FIXTURE = json.loads((Path(__file__).parent / "families" / "rwkv.json").read_text())


def publish(path: Path, vocab: int, *, newer: bool = True) -> Path:
    """Random weights under his names, half the values wide, as torch.save writes them."""
    family = families()["rwkv"]
    config = family.config(FIXTURE | {"vocab_size": vocab}, "fixture")
    torch.manual_seed(0)
    held = {
        blinkdl(family.hf_name(name)): torch.randn(shape).mul_(0.3).to(torch.bfloat16)
        for name, shape in expected_shapes(config).items()
    }
    torch.save(held, path, _use_new_zipfile_serialization=newer)
    return path


@pytest.fixture
def raven(tiny_folder: Path, tmp_path: Path) -> Path:
    """With another RWKV in the folder, as in his repositories."""
    shutil.copyfile(tiny_folder / "tokenizer.json", tmp_path / "20B_tokenizer.json")
    publish(tmp_path / "RWKV-4-Raven-3B-v12-ctx4096.pth", 400)
    return publish(tmp_path / "RWKV-4-Raven-tiny-v12-Eng98%-20230520-ctx8192.pth", 384)


def test_a_file_is_a_model(raven: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(raven)
    assert checkpoint.config.vocab == 384 and checkpoint.config.max_pos == 8192
    model = load(raven, dtype="float32")
    assert model.tokenizer.eos_id == 0 and "Alice" in (model.tokenizer.chat_template or "")
    save_hf(model.decoder, model.tokenizer, tmp_path / "hf", torch.bfloat16)
    again = load_decoder(tmp_path / "hf", dtype=torch.float32)
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("newer", [True, False])
def test_a_folder_with_only_it_and_its_way_into_the_book(
    newer: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    path = publish(folder / "RWKV-4-Pile-tiny-20220807.pth", 384, newer=newer)
    shutil.copyfile(tiny_folder / "tokenizer.json", folder / "tokenizer.json")
    assert open_checkpoint(folder).config.max_pos == 1024
    book = Book(tmp_path / "home")
    for ref in (str(path), str(folder)):
        artifact = Fetch(ref=ref).run(book)
        assert load(artifact.ref, book=book).tokenizer.size == Tokenizer.load(tiny_folder).size
        assert {one.name for one in artifact.path.glob("*.pth")} == {path.name}


def test_the_tokenizer_by_the_name_or_the_number_of_words(tmp_path: Path) -> None:
    by_name = publish(tmp_path / "RWKV-4-World-tiny.pth", 300)
    by_size = publish(tmp_path / "RWKV-4-other.pth", 65_536)
    neox = publish(tmp_path / "RWKV-4-Pile.pth", 300)
    for path, wanted in (
        (by_name, "rwkv_vocab_v20230424.txt"),
        (by_size, "rwkv_vocab_v20230424.txt"),
        (neox, "20B_tokenizer.json"),
    ):
        load_decoder(path)
        with pytest.raises(FileError, match=f"needs the tokenizer {wanted}, which is not beside"):
            load(path)
    lines = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)]
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("\n".join(lines))
    assert Tokenizer.load(by_name).decode(Tokenizer.load(by_name).encode("牛")) == "牛"
    with pytest.raises(FileError, match=r"needs the tokenizer 20B_tokenizer\.json"):
        load(neox)


def test_what_is_none(raven: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no model"):
        open_checkpoint(tmp_path)  # two of them: which?
    held = torch.load(raven)
    odd = [("emb.weight", (3,)), ("blocks.0.att.time_first", ()), ("blocks.0.att.time_first", (1,))]
    for name, shape in odd:
        torch.save(held | {name: torch.zeros(shape)}, tmp_path / "odd.pth")
        with pytest.raises(HerdbookError):
            open_checkpoint(tmp_path / "odd.pth")
    torch.save(held | {"blocks.9999999999.x": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(HerdbookError):
        open_checkpoint(tmp_path / "odd.pth")
    (tmp_path / "odd.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(FileError, match="neither as a zip nor as a pickle of torch"):
        open_checkpoint(tmp_path / "odd.pth")
    torch.save({}, tmp_path / "odd.pth")
    with pytest.raises(FileError, match="holds no model"):
        open_checkpoint(tmp_path / "odd.pth")
