"""Hostile folders and files: refused at once, in little memory, with a reason. More in tests/files."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from herdbook.errors import FileError
from herdbook.files import gguf
from herdbook.model.checkpoint import (
    INDEX,
    expected_shapes,
    load_decoder,
    open_checkpoint,
    save_gguf,
)
from herdbook.model.families import families
from herdbook.model.modules import build
from herdbook.training.memory import Peak
from tests.model.lean import resident


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """What is refused is refused within a second or two and 300 MB."""
    before = resident()
    with Peak() as peak:
        start = time.monotonic()
        yield
    assert time.monotonic() - start < 10
    assert peak.bytes - before < 300e6


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- config.json ---


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2**31 - 1},
        {"num_hidden_layers": 9_999},
        {"vocab_size": 2**31 - 1},
        {"hidden_size": 2**31 - 4},
        {"head_dim": 2**31 - 2},
        {"intermediate_size": 2**31 - 1},
        {"num_attention_heads": 2**31 - 2, "head_dim": 2**31 - 2},
        {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4},
        {"hidden_size": 10**400},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": 1e400},
        {"hidden_act": ["silu"]},
        {"rope_parameters": {"partial_rotary_factor": "x", "rope_type": "default"}},
        {"rope_parameters": None, "rope_scaling": [1]},
        {"rope_parameters": None, "rope_scaling": {"rope_type": {}, "factor": 2}},
        {"model_type": ["llama"]},
        {"model_type": {}},
        {"num_key_value_heads": 0},
        {"tie_word_embeddings": 1},
    ],
)
def test_absurd_values(changes: dict[str, Any], folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises(FileError) as caught:
        open_checkpoint(folder)
    assert caught.value.next


def test_a_window_for_each_of_many_layers(folder: Path) -> None:
    edit(folder, model_type="qwen2", use_sliding_window=True, sliding_window=4)
    edit(folder, num_hidden_layers=2**31 - 1)
    with pytest.raises(FileError, match="num_hidden_layers is 2147483647"):
        open_checkpoint(folder)


def test_a_config_of_a_gigabyte_and_a_deep_one(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.write(b"{")
        file.truncate(1_000_000_000)
    with pytest.raises(
        FileError, match=r"has 1,000,000,000 bytes but no file of its kind has more"
    ):
        open_checkpoint(folder)
    for text in ("[" * 1_000_000, '{"a":' * 500_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(FileError, match="nested too deep"):
            open_checkpoint(folder)
    (folder / "config.json").write_text('{"hidden_size": 64, "hidden_size": 65}')
    with pytest.raises(FileError, match="'hidden_size' comes twice"):
        open_checkpoint(folder)
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(FileError, match="is no JSON"):
        open_checkpoint(folder)


# --- the index and what it names ---


def index(folder: Path, **entries: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": entries}))


@pytest.mark.parametrize(
    "file",
    ["../../etc/passwd", "/etc/passwd", "../x.safetensors", "a\\..\\b.safetensors/", "..", "", ".",
     "a/../model.safetensors", "model.safetensors\0", "\n.safetensors", "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_an_index_that_leads_outside(file: str, folder: Path) -> None:
    index(folder, a=file)
    with pytest.raises(FileError, match="but shards lie beside the index"):
        open_checkpoint(folder)


def test_an_index_that_is_large_or_names_things_twice(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(FileError, match="'a' comes twice"):
        open_checkpoint(folder)
    with (folder / INDEX).open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(FileError, match="has 1,000,000,000 bytes"):
        open_checkpoint(folder)


def test_links(folder: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links, so they are followed; to files alone."""
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    load_decoder(folder)
    for target in ("/dev/zero", "/dev/random", weights, folder):
        weights.unlink()
        weights.symlink_to(target)
        with pytest.raises(FileError):
            open_checkpoint(folder)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(FileError, match=r"holds no model|is no file"):
        open_checkpoint(folder)
    os.mkfifo(folder / "m.gguf")
    with pytest.raises(FileError, match="is no file"):
        open_checkpoint(folder / "m.gguf")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(FileError, match=r"holds no model|is no file"):
        open_checkpoint(folder)


def test_the_same_name_in_two_shards(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    for name in ("a", "b"):
        save_file(held, folder / f"{name}.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"lies in a\.safetensors and in b\.safetensors"):
        open_checkpoint(folder)


def test_weights_of_another_kind(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"].to(torch.int64)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(FileError, match=r"'model\.norm\.weight' is of whole numbers"):
        open_checkpoint(folder)


def test_weights_that_shrink_while_they_are_read(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(FileError, match="became shorter meanwhile"):
        for name in checkpoint.names:
            checkpoint.read(name, torch.float32)


# --- experts ---


@pytest.fixture(params=["mixtral", "switch_transformers"])
def experts(request: Any, tmp_path: Path) -> Path:
    """A folder of a family with experts, its weights all 0."""
    fixture = Path(__file__).parent / "families" / f"{request.param}.json"
    source = json.loads(fixture.read_text())
    family = families()[request.param]
    config = family.config(source, "fixture")
    shapes = expected_shapes(config)
    held = {family.hf_tensor(name, config).name: torch.zeros(shapes[name]) for name in shapes}
    save_file(held, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(source))
    return tmp_path


@pytest.mark.parametrize("count", [30, 1_000_000, 2**31 - 1])
def test_more_experts_than_there_are(count: int, experts: Path) -> None:
    open_checkpoint(experts)
    source = json.loads((experts / "config.json").read_text())
    edit(experts, **{key: count for key in ("num_local_experts", "num_experts") if key in source})
    with pytest.raises(FileError, match=f"asks for {count:,} experts in each of [34] layers"):
        open_checkpoint(experts)


def test_wider_experts_than_there_are(experts: Path) -> None:
    source = json.loads((experts / "config.json").read_text())
    key = "intermediate_size" if "intermediate_size" in source else "d_ff"
    edit(experts, **{key: 50_000})
    with pytest.raises(FileError, match=r"of 50,000 × (64|32) at least twice but the weights are"):
        open_checkpoint(experts)
    edit(experts, **{key: source[key] + 1})
    with pytest.raises(FileError, match=r"has the shape .* but the config asks for"):
        open_checkpoint(experts)


def test_one_expert_of_another_size(experts: Path) -> None:
    held = load_file(experts / "model.safetensors")
    name = next(name for name in reversed(held) if "expert" in name)
    held[name] = torch.zeros(held[name].shape[0], held[name].shape[1] + 1)
    save_file(held, experts / "model.safetensors")
    with pytest.raises(FileError, match=rf"{re.escape(name)}' has the shape"):
        open_checkpoint(experts)


# --- GGUF ---


@pytest.fixture
def file(folder: Path) -> Path:
    save_gguf(load_decoder(folder), None, folder / "m.gguf", "Q8_0")
    return folder / "m.gguf"


def rewrite(file: Path, **changes: Any) -> None:
    found = gguf.read(file)
    tensors = [(name, t.type, found.array(name)) for name, t in found.tensors.items()]
    metadata = {**found.metadata, **{key.replace("__", "."): v for key, v in changes.items()}}
    gguf.write(file, metadata, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"llama__block_count": 2**32 - 1},
        {"llama__block_count": 9_000},
        {"llama__embedding_length": 2**32 - 1},
        {"llama__embedding_length": "64"},
        {"llama__attention__head_count": 0},
        {"llama__attention__head_count": [4, 4, 4]},
        {"llama__attention__head_count": "4"},
        {"llama__attention__key_length": 2**32 - 2},
        {"llama__rope__freq_base": float("inf")},
        {"llama__attention__layer_norm_rms_epsilon": -1.0},
        {"llama__expert_count": "many"},
        {"general__architecture": ["llama"]},
    ],
)
def test_absurd_metadata(changes: dict[str, Any], file: Path) -> None:
    rewrite(file, **changes)
    with pytest.raises(FileError) as caught:
        open_checkpoint(file)
    assert caught.value.next


def test_rotary_frequencies_that_nobody_has(file: Path) -> None:
    found = gguf.read(file)
    tensors: list[Any] = [(name, t.type, found.array(name)) for name, t in found.tensors.items()]
    for values in (torch.full((8,), 3e38), torch.ones(100_000), torch.arange(8.0) + 1):
        gguf.write(file, found.metadata, [*tensors, ("rope_freqs.weight", "F32", values.numpy())])
        with pytest.raises(FileError, match="holds a rotary scaling that is not LLaMA 3's"):
            open_checkpoint(file)


@pytest.mark.parametrize("count", [40, 2**31 - 1])
def test_more_stacked_experts_than_there_are(count: int, tmp_path: Path) -> None:
    source = json.loads((Path(__file__).parent / "families" / "mixtral.json").read_text())
    decoder = build(families()["mixtral"].config(source, "fixture"))
    decoder.family = "mixtral"
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    save_gguf(decoder, None, tmp_path / "m.gguf", "F16")
    open_checkpoint(tmp_path / "m.gguf")
    rewrite(tmp_path / "m.gguf", llama__expert_count=count)
    with pytest.raises(FileError, match=f"asks for {count:,} experts"):
        open_checkpoint(tmp_path / "m.gguf")
