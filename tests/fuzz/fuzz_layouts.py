"""Hostile files in the layouts of their own: compressed-tensors, RWKV's .pth, SAT's parts."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from herdbook.compression.layers import quantise_layers
from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_compressed, save_hf
from herdbook.model.checkpoint.compressed import KEY, PACKED
from herdbook.model.families import families
from tests.fuzz.hostile import JSON, ODD, again_and_again, common, damaged, holds
from tests.model import test_rwkv_pth, test_sat
from tests.model.test_families import random_decoder

DTYPES = st.sampled_from([torch.int32, torch.int64, torch.float16, torch.float32, torch.uint8])


def changed(value: Any, data: st.DataObject) -> Any:
    """With one of its values replaced, at any depth."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(value)))
        return {**value, key: changed(value[key], data)}
    return data.draw(JSON)


def another(tensor: torch.Tensor, data: st.DataObject) -> torch.Tensor:
    """Of another shape, another type, or with other values."""
    kind = data.draw(st.sampled_from(["shape", "type", "values", "strides"]))
    if kind == "shape":
        return torch.ones(data.draw(st.lists(st.integers(0, 70), max_size=3)), dtype=tensor.dtype)
    if kind == "type":
        return tensor.to(data.draw(DTYPES))
    if kind == "strides" and tensor.ndim == 2:
        return tensor.T
    if tensor.dtype.is_floating_point:
        values = [0.0, float("nan"), float("inf"), 6e4]
        return torch.full_like(tensor, data.draw(st.sampled_from(values)))
    return torch.full_like(tensor, min(data.draw(ODD), torch.iinfo(tensor.dtype).max))


def test_compressed_tensors(model: Path, tmp_path: Path) -> None:
    """The quantization_config with other values; packed tensors of other shapes, types and values."""
    folders = []
    for bits in (4, 8):
        decoder = load_decoder(model, dtype=torch.float32)
        quantise_layers(decoder, bits)
        folders.append(tmp_path / f"int{bits}")
        save_compressed(decoder, None, folders[-1], lambda name: torch.float16)
    folder = tmp_path / "m"

    @common
    @given(st.data())
    def target(data: st.DataObject) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(data.draw(st.sampled_from(folders)), folder)
        kind = data.draw(st.sampled_from(["config", "tensor", "missing", "header"]))
        file = folder / "model.safetensors"
        if kind == "config":
            config = json.loads((folder / "config.json").read_text())
            for _ in range(data.draw(st.integers(1, 3))):
                config[KEY] = changed(config[KEY], data)
            (folder / "config.json").write_text(json.dumps(config))
        elif kind == "header":
            raw = file.read_bytes()
            head = 8 + int.from_bytes(raw[:8], "little")
            file.write_bytes(damaged(raw[:head], data) + raw[head:])
        else:
            held = load_file(file)
            packed = sorted(name.rpartition(".")[0] for name in held if name.endswith(PACKED))
            module = data.draw(st.sampled_from(packed))
            one = data.draw(st.sampled_from([name for name in held if name.startswith(module)]))
            if kind == "tensor":
                held[one] = another(held[one], data).contiguous()
            else:
                del held[one]
            save_file(held, file)
        quantised = data.draw(st.booleans())
        holds(lambda: load_decoder(folder, dtype=torch.float32, quantised=quantised))

    again_and_again(target)


def in_a_pickle(
    path: Path, load: Callable[[], Any], rename: Callable[[str, st.DataObject], str]
) -> None:
    """A dictionary of tensors in torch's zip: its program damaged, its tensors others."""
    whole = torch.load(path)
    held = whole.get("module", whole)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    @common
    @given(st.data())
    def target(data: st.DataObject) -> None:
        if data.draw(st.booleans()):
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in members.items():
                    pickled = name.endswith("data.pkl")
                    archive.writestr(name, damaged(content, data) if pickled else content)
        else:
            others = dict(held)
            for _ in range(data.draw(st.integers(1, 3))):
                name = data.draw(st.sampled_from(sorted(others)))
                tensor = others.pop(name)
                if data.draw(st.integers(0, 5)):
                    others[rename(name, data)] = another(tensor, data)
            torch.save({"module": others} if held is not whole else others, path)
        holds(load)

    again_and_again(target)


def test_rwkvs_file(tmp_path: Path) -> None:
    path = test_rwkv_pth.publish(tmp_path / "RWKV-4-tiny-ctx1024.pth", 120)

    def rename(name: str, data: st.DataObject) -> str:
        number = data.draw(ODD | st.integers(0, 9))
        layer = f"blocks.{number}.{name.split('.', 2)[-1]}"
        return data.draw(st.sampled_from([name, layer, "x"]))

    in_a_pickle(path, lambda: load_decoder(path, dtype=torch.float32), rename)


def test_sats_parts(tmp_path: Path) -> None:
    decoder = random_decoder(families()["glm_130b"].config(test_sat.FIXTURE, "fixture"))
    decoder.family = "glm_130b"
    save_hf(decoder, None, tmp_path / "whole", torch.float16)
    checkpoint = open_checkpoint(tmp_path / "whole")
    names = checkpoint.weights.shapes
    whole = {name: checkpoint.weights.read(name, torch.float16) for name in names}
    (tmp_path / "sat").mkdir()
    inner = test_sat.write(tmp_path / "sat", whole, 2)

    def rename(name: str, data: st.DataObject) -> str:
        number = data.draw(ODD | st.integers(0, 9))
        return data.draw(st.sampled_from([name, name.replace(".0.", f".{number}."), "x"]))

    part = inner / "mp_rank_01_model_states.pt"
    in_a_pickle(part, lambda: load_decoder(tmp_path / "sat", dtype=torch.float32), rename)
