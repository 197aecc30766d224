"""Tokenizers from foreign hands: refused quickly, in little memory, with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from herdbook.errors import FileError
from herdbook.tokens import settings
from herdbook.tokens.sentence import PieceModel
from herdbook.tokens.tokenizer import Tokenizer
from tests.tokens.conftest import byte_metadata, piece_metadata

MODEL = PieceModel(["<unk>", "a"], [0.0, 0.0], [2, 1]).serialise()
WORDS = json.dumps({"a": 0})


def refused(path: Path) -> str:
    with pytest.raises(FileError) as caught:
        Tokenizer.load(path)
    assert caught.value.next
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"extra_ids": 10**12}, "with the id 1000000000000"),
        ("tokenizer_config.json", {"extra_ids": -1}, "with the id -1"),
        ("tokenizer_config.json", {"extra_ids": "many"}, "invalid literal"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(2**40): {"content": "x"}}},
            "with the id 1099511627776",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {}}}, "KeyError: 'content'"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "AttributeError"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template is 5"),
        ("tokenizer_config.json", {"bos_token": {}}, "KeyError"),
        ("added_tokens.json", {"x": 10**12}, "with the id 1000000000000"),
        ("added_tokens.json", {"x": "one"}, "TypeError"),
        ("config.json", {"eos_token_id": ["two"]}, "TypeError"),
        ("config.json", {"_name_or_path": 5}, "AttributeError"),
    ],
)
@pytest.mark.parametrize("kind", ["tokenizer.model", "vocab.json"])
def test_odd_values_beside_a_tokenizer(
    kind: str, name: str, content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "extra_ids" in content and kind == "vocab.json":
        pytest.skip("are SentencePiece's alone")
    (tmp_path / kind).write_bytes(MODEL if kind == "tokenizer.model" else WORDS.encode())
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / name).write_text(json.dumps(content))
    assert message in refused(tmp_path)


def test_ids_and_sizes_beyond_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 10**12}))
    (tmp_path / "merges.txt").write_text("")
    assert "with the id 1000000000000" in refused(tmp_path)
    lines = "".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256))
    world = tmp_path / "rwkv_vocab_v20230424.txt"
    world.write_text(lines + f"{10**12} 'ab' 2\n")
    assert "with the id 1000000000000" in refused(world)
    world.write_text(lines + f"257 {'(' * 5000} 1\n")
    assert "is no line of an RWKV vocabulary" in refused(world)
    large = tmp_path / "tokenizer.json"
    with large.open("wb") as file:
        file.truncate(settings.FILE_LIMIT + 1)
    assert "no file of its kind has more than 64,000,000" in refused(large)
    model = tmp_path / "many.model"
    model.write_bytes(b"\x0a\x00" * (settings.MOST_IDS + 1))
    assert "more than 1,048,576 pieces" in refused(model)


def test_words_of_which_the_last_stands_twice(tmp_path: Path) -> None:
    """Told in less than the square of their number."""
    names = ["<unk>", "</n>", "</_>", *map(str, range(200_000)), "199999"]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    assert "'199999' stands there twice" in refused(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", [None]),
        ("tokens", 5),
        ("token_type", [[]]),
        ("scores", [1e300]),
        ("scores", [0.0, 1.0]),
        ("precompiled_charsmap", 2**40),
        ("bos_token_id", 0.5),
        ("merges", [5]),
        ("model", []),
    ],
)
def test_lists_of_another_kind(key: str, value: Any) -> None:
    plain = byte_metadata() if key == "merges" else piece_metadata()
    own = plain.get(f"tokenizer.ggml.{key}")
    if isinstance(value, list) and len(value) == 1 and isinstance(own, list):
        value = [*value, *own[1:]]  # one of them
    with pytest.raises(FileError) as caught:
        Tokenizer.from_gguf(plain | {f"tokenizer.ggml.{key}": value}, Path("m.gguf"))
    assert caught.value.next


def test_an_unknown_token_that_is_none() -> None:
    """Some files say 4294967295."""
    metadata = piece_metadata() | {"tokenizer.ggml.unknown_token_id": 2**32 - 1}
    assert Tokenizer.from_gguf(metadata, Path("m.gguf")).encode("hi")


def test_a_library_that_breaks_off_is_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It panics where a damaged file leads it out of a list (found by fuzzing)."""

    class PanicException(BaseException):
        pass

    class Broken:
        error: type[BaseException] = PanicException

        def encode(self, text: str, add_special_tokens: bool) -> None:
            raise self.error("index out of bounds")

    codec = Tokenizer.from_gguf(byte_metadata(), Path("model.gguf")).codec
    monkeypatch.setattr(codec, "_plain", Broken())
    with pytest.raises(FileError, match=r"(?s)index out of bounds.*damaged"):
        codec.encode("a")
    with pytest.raises(FileError, match=r"(?s)index out of bounds.*damaged"):
        codec.encode_spans("a", first=True)
    monkeypatch.setattr(Broken, "error", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        codec.encode("a")
