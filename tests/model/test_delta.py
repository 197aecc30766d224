"""Deltas: what is applied is what was made, bit by bit; on another base nothing is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from herdbook.errors import ConfigError, FileError
from herdbook.model import delta
from herdbook.model.checkpoint import INDEX, load_decoder, open_checkpoint, save_gguf, save_hf
from herdbook.model.difference import difference, restore
from herdbook.progress import Progress
from herdbook.training.memory import Peak
from tests.model import lean

SILENT = Progress()
WEIGHTS = "model.safetensors"


def bits(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """Seven values of any bits: infinities, NaN, −0 and denormal ones among them."""
    whole = {2: np.int16, 4: np.int32, 8: np.int64}[dtype.itemsize]
    return arrays.arrays(whole, 7).map(lambda raw: torch.from_numpy(raw).view(dtype))


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("of_base", FLOATS)
@pytest.mark.parametrize("of_target", FLOATS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_bits_come_back(
    of_target: torch.dtype, of_base: torch.dtype, data: st.DataObject
) -> None:
    target, base = data.draw(bits(of_target)), data.draw(bits(of_base))
    change = difference(target, base)
    assert change.delta.dtype == of_target and change.at.dtype == torch.int32
    again = restore(change, base)
    assert torch.equal(again.view(torch.uint8), target.view(torch.uint8))


def test_little_is_kept_of_a_tuned_model() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1 << 20, generator=generator).mul_(0.02)
    target = base + torch.randn(1 << 20, generator=generator).mul_(0.0002)
    for dtype, most in ((torch.bfloat16, 0.02), (torch.float16, 0.02), (torch.float32, 0.02)):
        change = difference(target.to(dtype), base.to(dtype))
        assert len(change.at) <= most * len(base), dtype
        # what other tools do with it: as good as the type allows
        plain = base.to(dtype) + change.delta
        torch.testing.assert_close(plain, target.to(dtype), rtol=2e-2, atol=2e-4)


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


def tune(base: Path, tuned: Path, dtype: torch.dtype, rows: int = 0) -> Path:
    """The base with other values everywhere, in another type, with `rows` more words."""
    shutil.copytree(base, tuned)
    torch.manual_seed(0)
    held = load_file(base / WEIGHTS)
    for name, tensor in held.items():
        held[name] = (tensor + 0.01 * torch.randn(tensor.shape)).to(dtype)
    embed = held["model.embed_tokens.weight"]
    held["model.embed_tokens.weight"] = torch.cat([embed, torch.randn(rows, 64).to(dtype)])
    held["model.norm.weight"][3] = -0.0
    save_file(held, tuned / WEIGHTS)
    config = json.loads((tuned / "config.json").read_text())
    config |= {"vocab_size": 384 + rows, "dtype": str(dtype).removeprefix("torch.")}
    (tuned / "config.json").write_text(json.dumps(config))
    return tuned


def same_tensors(a: Path, b: Path) -> bool:
    """The same names, types, shapes and bytes."""
    one, two = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    return one.keys() == two.keys() and all(
        (t.dtype, t.shape) == (two[name].dtype, two[name].shape)
        and torch.equal(t.view(torch.uint8), two[name].view(torch.uint8))
        for name, t in one.items()
    )


@pytest.mark.parametrize("rows", [0, 1, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_tuned_model_comes_back(
    dtype: torch.dtype, rows: int, base: Path, tmp_path: Path
) -> None:
    tuned, path, again = tune(base, tmp_path / "t", dtype, rows), tmp_path / "d", tmp_path / "a"
    made = delta.make(base, tuned, path, progress=SILENT)
    assert made["tensors"] == len(load_file(tuned / WEIGHTS)) and made["kept_values"] >= 1
    done = delta.apply(base, path, again, progress=SILENT)
    assert done["values"] == made["values"]
    assert same_tensors(again, tuned)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (again / name).read_bytes() == (tuned / name).read_bytes(), name
    assert load_decoder(again).config.vocab == 384 + rows
    assert {one.name for one in tmp_path.iterdir()} == {"base", "t", "d", "a"}, "nothing is left"


def test_the_record_names_every_tensor_of_both(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "t", torch.float16, 2)
    delta.make(base, tuned, tmp_path / "d", progress=SILENT)
    from safetensors import safe_open

    with safe_open(tmp_path / "d" / delta.RECORD, "pt") as file:
        record = json.loads(file.metadata()["herdbook_delta"])
    assert record["base"] == "base"
    assert record["tensors"].keys() == load_file(tuned / WEIGHTS).keys()
    embed = record["tensors"]["model.embed_tokens.weight"]
    assert embed["base_shape"] == [384, 64] and embed["base"].startswith("sha256:")


def test_sharded(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "t", torch.bfloat16)
    delta.make(base, tuned, tmp_path / "d", progress=SILENT, shard_bytes=50_000)
    assert (tmp_path / "d" / INDEX).is_file()
    delta.apply(base, tmp_path / "d", tmp_path / "a", progress=SILENT, shard_bytes=80_000)
    want, found = (open_checkpoint(tmp_path / one) for one in ("t", "a"))
    assert len(found.weights.files) > 1
    for name in want.names:
        a, b = (one.read(name, torch.bfloat16) for one in (want, found))
        assert torch.equal(a.view(torch.int16), b.view(torch.int16)), name


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    tuned, path = tune(base, tmp_path / "t", torch.float16), tmp_path / "d"
    delta.make(base, tuned, path, progress=SILENT)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    held = load_file(other / WEIGHTS)
    held["model.norm.weight"][0] += 1e-3
    save_file(held, other / WEIGHTS)
    with pytest.raises(FileError, match=r"'model\.norm\.weight', \[64\] is not that of .*'base'"):
        delta.apply(other, path, tmp_path / "a", progress=SILENT)
    # the base in another type is another base: its values are rounded
    save_hf(load_decoder(base, dtype=torch.float32), None, tmp_path / "half", torch.float16)
    with pytest.raises(FileError, match="is not that of the model"):
        delta.apply(tmp_path / "half", path, tmp_path / "a", progress=SILENT)
    assert not (tmp_path / "a").exists()
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_models_that_do_not_belong_together(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "t", torch.float16, 4)
    with pytest.raises(FileError, match=r"\[384, 64\] in .* but \[388, 64\] in the base"):
        delta.make(tuned, base, tmp_path / "d", progress=SILENT)
    config = json.loads((tuned / "config.json").read_text())
    held = load_file(tuned / WEIGHTS)
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
    save_file(held, tuned / WEIGHTS)
    (tuned / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(FileError, match=r"not one kind of model: \['head\.weight'\] is in one"):
        delta.make(base, tuned, tmp_path / "d", progress=SILENT)
    del held["lm_head.weight"]
    save_file(held, tuned / WEIGHTS)
    (tuned / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(FileError, match="llama, mistral"):
        delta.make(base, tuned, tmp_path / "d", progress=SILENT)
    assert not (tmp_path / "d").exists()


def test_a_delta_is_no_model(base: Path, tmp_path: Path) -> None:
    tuned, path = tune(base, tmp_path / "t", torch.float16), tmp_path / "d"
    delta.make(base, tuned, path, progress=SILENT)
    for use in (
        lambda: load_decoder(path),
        lambda: delta.make(base, path, tmp_path / "x", progress=SILENT),
        lambda: delta.make(path, tuned, tmp_path / "x", progress=SILENT),
    ):
        with pytest.raises(FileError, match="is a delta") as caught:
            use()
        assert "herd delta apply BASE" in caught.value.next
    with pytest.raises(FileError, match=f"holds no {delta.RECORD}, so nothing tells") as caught:
        delta.apply(base, tuned, tmp_path / "x", progress=SILENT)
    assert "--unchecked" in caught.value.next
    with pytest.raises(ConfigError, match="is there already"):
        delta.apply(base, path, tuned, progress=SILENT)


def change(path: Path, edit: Any) -> None:
    """Edit a safetensors file's tensors and metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    held = load_file(path)
    edit(held, metadata)
    save_file(held, path, metadata=metadata)


NAME = "model.norm.weight"


def without_targets(held: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["herdbook_delta"] = '{"base": "b", "tensors": []}'


@pytest.mark.parametrize(
    ("file", "edit", "reason"),
    [
        (WEIGHTS, lambda h, m: h[NAME].add_(1), "does not come out as the one"),
        (delta.RECORD, lambda h, m: h[f"{NAME}.value"].add_(1), "does not come out as the one"),
        (delta.RECORD, lambda h, m: h[f"{NAME}.at"].add_(64), "does not fit the tensor"),
        (delta.RECORD, lambda h, m: h[f"{NAME}.at"].sub_(64), "does not fit the tensor"),
        (delta.RECORD, lambda h, m: h.pop(f"{NAME}.at"), "does not come out as the one"),
        (delta.RECORD, lambda h, m: h.update({f"{NAME}.at": torch.arange(3)}), "does not fit"),
        (delta.RECORD, lambda h, m: m.clear(), "is no record of a delta"),
        (delta.RECORD, lambda h, m: m.update(herdbook_delta="[" * 99_999), "is no record"),
        (delta.RECORD, lambda h, m: m.update(herdbook_delta='{"tensors": {}}'), "is no record"),
        (delta.RECORD, without_targets, "is no record of a delta"),
    ],
)
def test_a_damaged_delta(file: str, edit: Any, reason: str, base: Path, tmp_path: Path) -> None:
    delta.make(base, tune(base, tmp_path / "t", torch.float16), tmp_path / "d", progress=SILENT)
    change(tmp_path / "d" / file, edit)
    with pytest.raises(FileError, match=reason):
        delta.apply(base, tmp_path / "d", tmp_path / "a", progress=SILENT)
    assert not (tmp_path / "a").exists()


def test_a_base_in_another_layout(base: Path, tmp_path: Path) -> None:
    """A GGUF as the base, as the embedded model is one; and pickled weights."""
    tuned = tune(base, tmp_path / "t", torch.float16)
    save_gguf(load_decoder(base, dtype=torch.float32), None, tmp_path / "b.gguf", "Q8_0")
    pickled = Path(shutil.copytree(base, tmp_path / "pickled"))
    torch.save(load_file(base / WEIGHTS), pickled / "pytorch_model.bin")
    (pickled / WEIGHTS).unlink()
    for i, one in enumerate((tmp_path / "b.gguf", pickled)):
        delta.make(one, tuned, tmp_path / f"d{i}", progress=SILENT)
        delta.apply(one, tmp_path / f"d{i}", tmp_path / f"a{i}", progress=SILENT)
        assert same_tensors(tmp_path / f"a{i}", tuned)
    delta.apply(base, tmp_path / "d1", tmp_path / "a", progress=SILENT)  # the same values
    with pytest.raises(FileError, match="is no Hugging Face folder"):
        delta.make(base, tmp_path / "b.gguf", tmp_path / "x", progress=SILENT)


def publish(base: Path, tuned: Path, path: Path, dtype: torch.dtype, *, bin: bool) -> Path:
    """The delta as FastChat's make_delta writes it: plain weights, new rows whole."""
    path.mkdir()
    held, whole = load_file(base / WEIGHTS), {}
    for name, target in load_file(tuned / WEIGHTS).items():
        whole[name] = target.to(dtype)
        whole[name][: len(held[name])] -= held[name].to(dtype)
    if bin:
        rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4, dtype=dtype)}
        torch.save(whole | rotary, path / "pytorch_model.bin")
    else:
        save_file(whole, path / WEIGHTS)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(tuned / name, path / name)
    return path


@pytest.mark.parametrize("bin", [False, True])
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("of_base", [torch.float16, torch.bfloat16, torch.float32])
def test_a_published_delta(
    of_base: torch.dtype, rows: int, bin: bool, base: Path, tmp_path: Path
) -> None:
    """What apply_delta does: both to float16, and added there; new rows are added to zeros."""
    held = {name: tensor.to(of_base) for name, tensor in load_file(base / WEIGHTS).items()}
    save_file(held, base / WEIGHTS)
    tuned = tune(base, tmp_path / "t", torch.float16, rows)
    path = publish(base, tuned, tmp_path / "d", torch.float16, bin=bin)
    done = delta.apply(base, path, tmp_path / "a", progress=SILENT, unchecked=True)
    assert done["checked"] == "names and shapes alone, no hash"
    change = torch.load(path / "pytorch_model.bin") if bin else load_file(path / WEIGHTS)
    found = load_file(tmp_path / "a" / WEIGHTS)
    assert found.keys() == held.keys()
    for name, tensor in found.items():
        want = torch.zeros(tensor.shape, dtype=torch.float16)
        want[: len(held[name])] = held[name].to(torch.float16)
        want += change[name]
        assert torch.equal(tensor.view(torch.int16), want.view(torch.int16)), name
    assert load_decoder(tmp_path / "a").config.vocab == 384 + rows
    assert (tmp_path / "a" / "tokenizer.json").is_file()


def test_an_alpaca_delta(base: Path, tmp_path: Path) -> None:
    """In float32, its new row taken from the mean of the base's rows."""
    tuned = tune(base, tmp_path / "t", torch.float32, 1)
    path = publish(base, tuned, tmp_path / "d", torch.float32, bin=True)
    held, change = load_file(base / WEIGHTS), torch.load(path / "pytorch_model.bin")
    mean = held["model.embed_tokens.weight"].mean(0)
    change["model.embed_tokens.weight"][384] -= mean
    torch.save(change, path / "pytorch_model.bin")
    delta.apply(base, path, tmp_path / "a", progress=SILENT, unchecked=True, new_rows="mean")
    found, want = load_file(tmp_path / "a" / WEIGHTS), load_file(tuned / WEIGHTS)
    for name, tensor in held.items():
        assert torch.equal(found[name][: len(tensor)], tensor + change[name][: len(tensor)]), name
        torch.testing.assert_close(found[name], want[name], atol=1e-6, rtol=0)


def test_a_tokenizer_of_its_own_kind_goes_with_it(base: Path, tmp_path: Path) -> None:
    """ice_text.model, spiece.model, a vocabulary file …; and the base's name, not its folder's."""
    tuned = tune(base, tmp_path / "t", torch.float16)
    (tuned / "ice_text.model").write_bytes(b"of ChatGLM-6B's kind")
    delta.make(base, tuned, tmp_path / "d", progress=SILENT, called="llama-7b")
    delta.apply(base, tmp_path / "d", tmp_path / "a", progress=SILENT)
    assert (tmp_path / "a" / "ice_text.model").read_bytes() == b"of ChatGLM-6B's kind"
    with pytest.raises(FileError, match=r"made from \('llama-7b', "):
        delta.apply(tuned, tmp_path / "d", tmp_path / "b", progress=SILENT)


def test_a_delta_of_ours_without_its_record(base: Path, tmp_path: Path) -> None:
    tuned, path = tune(base, tmp_path / "t", torch.float16), tmp_path / "d"
    delta.make(base, tuned, path, progress=SILENT)
    with pytest.raises(ConfigError, match="--new-rows mean is for deltas of other tools"):
        delta.apply(base, path, tmp_path / "a", progress=SILENT, new_rows="mean")
    (path / delta.RECORD).unlink()
    for unchecked in (False, True):
        with pytest.raises(FileError, match=r"delta\.safetensors is missing.*\n.*fetch the delta"):
            delta.apply(base, path, tmp_path / "a", progress=SILENT, unchecked=unchecked)
    assert not (tmp_path / "a").exists()


def test_the_digest_that_must_come_out(base: Path, tmp_path: Path) -> None:
    tuned = tune(base, tmp_path / "t", torch.float16, 1)
    path = publish(base, tuned, tmp_path / "d", torch.float16, bin=False)
    done = delta.apply(base, path, tmp_path / "a", progress=SILENT, unchecked=True)
    again = delta.apply(
        base, path, tmp_path / "b", progress=SILENT, expect=done["digest"], shard_bytes=50_000
    )
    assert again["digest"] == done["digest"] and again["checked"] == "digest"
    held = load_file(base / WEIGHTS)
    held["model.norm.weight"][0] += 1
    save_file(held, base / WEIGHTS)
    with pytest.raises(FileError, match=f"but {done['digest']} was expected"):
        delta.apply(base, path, tmp_path / "c", progress=SILENT, expect=done["digest"])
    assert not (tmp_path / "c").exists()


def test_a_published_delta_of_another_model(base: Path, tmp_path: Path) -> None:
    """Names, shapes and finite values are checked even so."""
    tuned = tune(base, tmp_path / "t", torch.float16, 1)
    path = publish(base, tuned, tmp_path / "d", torch.float16, bin=False)
    with pytest.raises(FileError, match=r"\[385, 64\] in .* but \[388, 64\] in the base"):
        other = tune(base, tmp_path / "o", torch.float16, 4)
        delta.apply(other, path, tmp_path / "a", progress=SILENT, unchecked=True)
    held = load_file(base / WEIGHTS)
    held["model.norm.weight"][0] = 1e30  # beyond float16
    save_file(held, base / WEIGHTS)
    with pytest.raises(FileError, match=r"'model\.norm\.weight' gives values that are not finite"):
        delta.apply(base, path, tmp_path / "a", progress=SILENT, unchecked=True)
    assert not (tmp_path / "a").exists()


def test_one_tensor_of_each_in_memory(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    lean.write(base, "safetensors", 80)
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    with (tuned / WEIGHTS).open("r+b") as file:  # other bits in the first values of the embedding
        file.seek(-100_000, 2)
        file.write(bytes(1000))
    delta.make(base, base, tmp_path / "warm", progress=SILENT)
    before = lean.resident()
    with Peak() as peak:
        delta.make(base, tuned, tmp_path / "d", progress=SILENT)
        delta.apply(base, tmp_path / "d", tmp_path / "again", progress=SILENT)
        delta.apply(base, tuned, tmp_path / "sum", progress=SILENT, unchecked=True)
    assert peak.bytes - before < 60e6, "the two models have 160 MB"
    assert same_tensors(tmp_path / "again", tuned)
