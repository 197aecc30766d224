"""GLM-130B's files as SAT wrote them: parts of a model, put together, are the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_hf
from herdbook.model.families import families
from herdbook.model.layout import Packed
from tests.model.test_families import random_decoder

FIXTURE = json.loads((Path(__file__).parent / "families" / "glm_130b.json").read_text())
SIZES = {key: value for key, value in FIXTURE.items() if not key.endswith("token_id")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A random model's tensors under SAT's names, in float16."""
    folder = tmp_path_factory.mktemp("whole")
    decoder = random_decoder(families()["glm_130b"].config(FIXTURE, "fixture"))
    decoder.family = "glm_130b"
    save_hf(decoder, None, folder, torch.float16)
    checkpoint = open_checkpoint(folder)
    return {
        name: checkpoint.weights.read(name, torch.float16) for name in checkpoint.weights.shapes
    }


def part(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """What SAT's parallel layers keep of it on one machine."""
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return tensor.chunk(ranks, 1)[rank].clone()
    if "dense_h_to_4h" in name:
        up, gate = tensor.chunk(2)
        return torch.cat([up.chunk(ranks)[rank], gate.chunk(ranks)[rank]])
    if "query_key_value" in name or "word_embeddings" in name:
        return tensor.chunk(ranks)[rank].clone()
    return tensor


def write(folder: Path, whole: dict[str, Tensor], ranks: int, **options: Any) -> Path:
    inner = folder / "49300"
    inner.mkdir()
    (folder / "latest").write_text("49300\n")
    for rank in range(ranks):
        held = {name: part(name, tensor, rank, ranks) for name, tensor in whole.items()}
        for n in range(3):
            turning = torch.zeros(8, dtype=torch.float16)
            held[f"transformer.layers.{n}.attention.rotary_emb.inv_freq"] = turning
        torch.save({"module": held}, inner / f"mp_rank_{rank:02}_model_states.pt", **options)
    return inner


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_parts_are_the_whole(
    ranks: int, newer: bool, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    inner = write(tmp_path, whole, ranks, _use_new_zipfile_serialization=newer)
    want = random_decoder(families()["glm_130b"].config(FIXTURE, "fixture"))
    for path in (tmp_path, inner):
        checkpoint = open_checkpoint(path)
        assert checkpoint.family.name == "glm_130b"
        for name, tensor in whole.items():
            assert torch.equal(checkpoint.weights.read(name, torch.float16), tensor), name
        decoder = load_decoder(path, dtype=torch.float32)
        for name, tensor in want.state_dict().items():
            close = tensor.to(torch.float16).float()
            assert torch.equal(decoder.state_dict()[name], close), name
    assert (checkpoint.config.heads, checkpoint.config.vocab) == (4, 120)


def test_with_a_config(whole: dict[str, Tensor], tmp_path: Path) -> None:
    inner = write(tmp_path, whole, 2)
    (inner / "config.json").write_text(json.dumps(FIXTURE))
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    want = random_decoder(families()["glm_130b"].config(FIXTURE, "fixture"))
    assert decoder.config == want.config
    ids = torch.tensor([5, 9, 117, 118, 7])
    with torch.inference_mode():
        a, b = (one.logits(one(ids, Packed([5]))) for one in (decoder, want))
    assert (a - b).abs().max() < 0.05 * b.std()


def test_parts_that_do_not_fit(whole: dict[str, Tensor], tmp_path: Path) -> None:
    inner = write(tmp_path, whole, 2)
    second = inner / "mp_rank_01_model_states.pt"
    kept = torch.load(second)["module"]

    def refused(reason: str, **changes: Tensor | None) -> None:
        held = {name: tensor for name, tensor in (kept | changes).items() if tensor is not None}
        torch.save({"module": held}, second)
        with pytest.raises(FileError, match=reason):
            open_checkpoint(tmp_path)

    qkv = "transformer.layers.1.attention.query_key_value.weight"
    refused("holds other tensors than mp_rank_00", **{qkv: None})
    wrong = {qkv: kept[qkv][:-1].clone()}
    refused(f"{qkv}' has not the same shape and type in all files so its parts cannot be", **wrong)
    refused("has not the same shape and type", **{qkv: kept[qkv].float()})
    shutil.move(second, inner / "mp_rank_02_model_states.pt")
    with pytest.raises(FileError, match=r"mp_rank_01_model_states\.pt is missing but there are 2"):
        open_checkpoint(tmp_path)
    (inner / "mp_rank_02_model_states.pt").unlink()
    with pytest.raises(FileError, match=r"query_key_value.*' has the shape \[96, 64\] but"):
        open_checkpoint(tmp_path)


def test_parts_of_parts(whole: dict[str, Tensor], tmp_path: Path) -> None:
    """Odd gates, and more machines than heads."""
    odd = {}
    for name, tensor in whole.items():
        odd[name] = tensor[:-1].clone() if "dense_h_to_4h" in name else tensor
    inner = tmp_path / "odd"
    inner.mkdir()
    torch.save({"module": odd}, inner / "mp_rank_00_model_states.pt")
    with pytest.raises(FileError, match="has 191 rows in each file so its parts cannot be"):
        open_checkpoint(inner)
    write(tmp_path, whole, 8)
    with pytest.raises(FileError, match="8 files for 4 heads cannot be put together"):
        open_checkpoint(tmp_path)


def test_without_any_word_of_its_sizes(whole: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"module": whole}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(FileError, match=r"do not tell the model's sizes and there is no config"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    assert open_checkpoint(tmp_path).config.prefix is not None
    for held in ({"weights": whole}, [whole], {"module": [1]}):
        torch.save(held, tmp_path / "mp_rank_00_model_states.pt")
        with pytest.raises(FileError, match="no dictionary"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("latest", ["../x", "/etc", "a/b", "", "x" * 1000, "gone"])
def test_a_latest_that_leads_elsewhere(
    latest: str, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    write(tmp_path, whole, 1)
    (tmp_path / "latest").write_text(latest)
    with pytest.raises(FileError, match="holds no model"):
        open_checkpoint(tmp_path)
