"""Strips that several threads put into their places."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from herdbook.errors import FileError
from herdbook.files import gguf
from herdbook.model.at_once import THREADS, at_once
from herdbook.model.checkpoint import load_decoder, save_hf, weights
from herdbook.model.checkpoint.weights import GGUFWeights
from herdbook.model.config import DecoderConfig
from herdbook.model.families import families
from herdbook.model.folds import Fold
from herdbook.model.modules import build

ROWS, COLUMNS = 96, 256


@pytest.fixture(params=["F32", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> GGUFWeights:
    values = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    gguf.write(tmp_path / "m.gguf", {"general.architecture": "x"}, [("a", request.param, values)])
    return GGUFWeights(gguf.read(tmp_path / "m.gguf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_any_order_and_number(
    source: GGUFWeights, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.from_numpy(source.file.array("a").astype(np.float32)).to(dtype)
    monkeypatch.setattr(weights, "STRIP_BYTES", 8 << 10)  # several strips
    row_of = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))[:50]
    for rows in (None, row_of):
        want = whole if rows is None else whole[rows]
        out = torch.full_like(want, torch.nan)
        steps = list(source.steps("a", out, rows))
        assert len(steps) > 3
        at_once(reversed(steps))
        assert torch.equal(out, want)
    if (both := source.blocks("a")) and (some := source.blocks("a", row_of)):
        at_once([*both[1], *some[1]])
        assert torch.equal(some[0].codes, both[0].codes[row_of])
        assert torch.equal(some[0].scale, both[0].scale[row_of])


def test_a_file_that_becomes_shorter_is_told(source: GGUFWeights) -> None:
    with source.file.path.open("r+b") as file:
        file.truncate(source.file.tensors["a"].offset + 100)
    with pytest.raises(FileError, match="became shorter"):
        at_once(source.steps("a", torch.empty(ROWS, COLUMNS)))


def test_the_first_failure_is_raised_and_the_rest_left() -> None:
    begun: list[int] = []
    fails = threading.Event()

    def step(i: int) -> None:
        if i == 0:
            fails.set()
            raise ValueError("first")
        fails.wait()
        begun.append(i)
        threading.Event().wait(0.05)

    with pytest.raises(ValueError, match="first"):
        at_once(partial(step, i) for i in range(200))
    assert len(begun) < 200 - THREADS


def test_inference_mode_is_that_of_who_asks() -> None:
    found: list[bool] = []
    for mode in (True, False):
        with torch.inference_mode(mode):
            at_once([lambda: found.append(torch.is_inference_mode_enabled())])
    assert found == [True, False]


@pytest.mark.parametrize("stride", ["turned", "plain"])
def test_a_folded_tensor_that_lies_in_another_order(stride: str, tmp_path: Path) -> None:
    """Baichuan's q, k and v are one tensor, and a pickle may keep it by columns."""
    torch.manual_seed(0)
    source = {
        "model_type": "baichuan", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
    decoder = build(families()["baichuan"].config(source, "config.json"))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_()
    decoder.family = "baichuan"
    decoder.source_config = source
    save_hf(decoder, None, tmp_path / "plain", torch.float32)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    packed = [name for name in tensors if "W_pack" in name]
    assert packed
    if stride == "turned":
        for name in packed:
            tensors[name] = tensors[name].t().contiguous().t()
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "bin")
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    loaded = load_decoder(tmp_path / "bin", dtype=torch.float32)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_parts_of_a_stack_keep_their_own_row_numbers_alone() -> None:
    fold = Fold(parts=("a",) * 8, stacked=True)
    part = fold.row_of(3, [1000] * 8, DecoderConfig(8, 8, 1, 1, 1, 8, 8, 8))
    assert part.base is None and part[0] == 3000 and part[-1] == 3999
