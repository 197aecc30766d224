"""A GGUF served as it lies there, without torch, against the decoder made of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import herdbook
from herdbook.engine import compiled, native
from herdbook.engine.engine import Engine
from herdbook.engine.kept import kept
from herdbook.engine.memory import estimated_bytes, held_bytes
from herdbook.engine.packaged import Packaged, packaged, plain_shapes
from herdbook.engine.request import Request, Sampling
from herdbook.engine.runner import step_for
from herdbook.engine.store import token_bytes
from herdbook.errors import FileError
from herdbook.model.checkpoint import expected_shapes, load_decoder, save_gguf
from herdbook.model.config import DecoderConfig, RopeScaling
from herdbook.model.decoder import Decoder
from herdbook.model.precision import compute_dtype
from herdbook.tokens.tokenizer import Tokenizer

from .test_native import CONFIG, CONFIGS, needs_native, quantised

pytestmark = needs_native
#: 384: the tiny tokenizer's
SHAPES = {
    "llama": {},
    "own head": {"tied": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 32, "kv_heads": 1},
    "llama 3": {"rope_scaling": RopeScaling("llama3", 8.0, 64, 1.0, 4.0), "head_dim": 32},
}
FAMILY = {"qwen2": "qwen2", "qwen3": "qwen3"}


def made(config: DecoderConfig, family: str, tokenizer: Tokenizer, path: Path, quant: str) -> Path:
    torch.manual_seed(5)
    decoder = Decoder(config)
    decoder.family = family
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.25)
    save_gguf(decoder.eval(), tokenizer, path, quant)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shapes_are_the_decoders(name: str) -> None:
    assert native.fits(CONFIGS[name])
    assert plain_shapes(CONFIGS[name]) == expected_shapes(CONFIGS[name])


@pytest.mark.parametrize("quant", ["Q4_1", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_is_that_of_the_decoder(
    shape: str, quant: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """The same tiles, norms and rotation to the last bit; embeddings are rounded by neither."""
    config = dataclasses.replace(CONFIG, vocab=384, **SHAPES[shape])
    family, tokenizer = FAMILY.get(shape, "llama"), Tokenizer.load(tiny_folder)
    file = made(config, family, tokenizer, tmp_path / "a.gguf", quant)
    model = packaged(file)
    assert model is not None and not model.opened and model.config == config
    assert getattr(torch, model.kind) == compute_dtype("cpu")
    ours, theirs = step_for(model), step_for(load_decoder(file, torch.float32, quantised=True))
    assert ours is not None and theirs is not None
    assert len(ours.kept) == len(theirs.kept)
    assert all(np.array_equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))
    ids = np.array([0, 5, 383])
    assert np.array_equal(ours.embed(ids), theirs.embed(ids))
    assert not model.opened
    assert ours.nbytes + model.held_bytes == pytest.approx(model.weight_bytes, rel=0.01)


@pytest.mark.parametrize("quant", ["Q4_1", "Q8_0"])
def test_the_estimate_counts_what_adapters_bring(
    quant: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """PyTorch has the weights as well, beside the native step's."""
    config, tokenizer = dataclasses.replace(CONFIG, vocab=384), Tokenizer.load(tiny_folder)
    file = made(config, "llama", tokenizer, tmp_path / "a.gguf", quant)
    engine = herdbook.load(file).engine
    for adapters in (False, True):
        if adapters:
            engine.model.module()
        # of this model, which is nearly nothing, the cache is left out of what is compared
        cache = engine.pool.tokens * token_bytes(config, engine.runner.kind)
        found = estimated_bytes(file, adapters=adapters) - cache
        assert found == pytest.approx(held_bytes(engine) - cache, rel=0.1)


def test_a_reply_comes_without_torch(tiny_folder: Path, tmp_path: Path) -> None:
    config, tokenizer = dataclasses.replace(CONFIG, vocab=384), Tokenizer.load(tiny_folder)
    file = made(config, "llama", tokenizer, tmp_path / "a.gguf", "Q4_1")
    code = (
        "import sys, herdbook\n"
        f"m = herdbook.load({str(file)!r})\n"
        "print(m.generate('the cat', max_tokens=5, temperature=0.9, top_p=0.9, seed=1))\n"
        "print(m.generate('the cat', max_tokens=3, logprobs=2, repetition_penalty=1.2))\n"
        "print(m.embed('the cat').shape, m.engine.score([5, 6], [[7], [8, 9]])[0].greedy)\n"
        "print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "False", said.stdout
    # and what needs torch brings it: the same model, by PyTorch
    model = herdbook.load(file)
    assert isinstance(model.model, Packaged) and not model.model.opened
    logits = model.logits([5, 6, 7])
    assert model.model.opened and logits.shape == (3, 384)
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    whole = load_decoder(file, torch.float32, quantised=True)
    here, there = (
        Engine(one, None, cache_dtype="float32").generate([Request([5, 6, 7], sampling)])[0].ids
        for one in (model.model, whole)
    )
    assert here == there


def test_two_engines_of_one_model_in_two_threads(tiny_folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab=384)
    file = made(config, "llama", Tokenizer.load(tiny_folder), tmp_path / "a.gguf", "Q4_1")
    model = packaged(file)
    assert model is not None
    asked = [Request([n, 5, 6], Sampling(max_tokens=40, ignore_eos=True)) for n in range(8)]
    want = [one.ids for one in Engine(model, None).generate(asked)]
    with ThreadPoolExecutor(2) as pool:
        engines = Engine(model, None), Engine(model, None)
        assert engines[0].runner._native is engines[1].runner._native
        for found in pool.map(lambda one: [r.ids for r in one.generate(asked)], engines):
            assert found == want


def test_a_file_that_changes_is_not_read_on(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer, config = Tokenizer.load(tiny_folder), dataclasses.replace(CONFIG, vocab=384)
    model = packaged(made(config, "llama", tokenizer, tmp_path / "a.gguf", "Q4_1"))
    assert model is not None
    made(config, "llama", tokenizer, tmp_path / "b.gguf", "Q8_0").replace(tmp_path / "a.gguf")
    for use in (model.module, lambda: model.step):
        with pytest.raises(FileError, match="was changed meanwhile"):
            use()


def test_matrices_of_one_product_have_one_width() -> None:
    """Files of llama-quantize --tensor-type keep, say, v in 8 bits beside q and k in 4."""
    decoder = quantised(CONFIG)
    assert kept(decoder) is not None
    decoder.blocks[1].attention.v = quantised(CONFIG, 8).blocks[1].attention.v
    assert kept(decoder) is None
    bits = {f"blocks.0.attention.{one}": 4 for one in "qkvo"} | {"blocks.0.mlp.down": 8}
    bits |= {"blocks.0.mlp.gate": 8, "blocks.0.mlp.up": 8}
    assert native.together(bits) and not native.together(bits | {"blocks.0.mlp.up": 4})


def test_what_does_not_fit_becomes_a_decoder(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    config = dataclasses.replace(CONFIG, vocab=384)
    assert packaged(made(config, "llama", tokenizer, tmp_path / "f.gguf", "F16")) is None
    assert packaged(tiny_folder) is None
    found = herdbook.load(tmp_path / "f.gguf")
    assert isinstance(found.model, Decoder)


def test_it_is_checked_like_any_other(tiny_folder: Path, tmp_path: Path) -> None:
    """A tensor that is missing or of another shape is told before anything is read."""
    config = dataclasses.replace(CONFIG, vocab=384)
    file = made(config, "llama", Tokenizer.load(tiny_folder), tmp_path / "a.gguf", "Q4_1")
    data = file.read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"))
    with pytest.raises(FileError, match=r"blk.1.ffn_up.weight' is missing"):
        packaged(tmp_path / "b.gguf")
    (tmp_path / "c.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileError):
        packaged(tmp_path / "c.gguf")


def test_without_the_machine_code_it_is_a_decoder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, vocab=384)
    file = made(config, "llama", Tokenizer.load(tiny_folder), tmp_path / "a.gguf", "Q4_1")
    monkeypatch.setenv("HERDBOOK_NATIVE", "0")
    compiled.library.cache_clear()
    assert packaged(file) is None
    assert isinstance(herdbook.load(file).model, Decoder)
    compiled.library.cache_clear()
