"""Older layouts: pytorch_model.bin, its shards, and Meta's own files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from herdbook.book.book import Book
from herdbook.engine.loading import load
from herdbook.errors import FamilyError, FileError
from herdbook.model.checkpoint import LEGACY_INDEX, load_decoder, open_checkpoint, save_hf
from herdbook.model.decoder import Decoder
from herdbook.model.fetch import Fetch
from herdbook.model.layout import Packed
from herdbook.model.references import resolve


@torch.inference_mode()
def logits(decoder: Decoder) -> Tensor:
    return decoder.logits(decoder(torch.arange(3, 40), Packed([37])))


@pytest.fixture
def state(tiny_folder: Path) -> dict[str, Tensor]:
    return load_file(tiny_folder / "model.safetensors")


@pytest.fixture
def pickled(tiny_folder: Path, tmp_path: Path, state: dict[str, Tensor]) -> Path:
    """The tiny model with its weights as pytorch_model.bin."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def shard(folder: Path, state: dict[str, Tensor]) -> dict[str, str]:
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    where = {}
    for i, some in enumerate((names[:10], names[10:]), 1):
        file = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({name: state[name] for name in some}, folder / file)
        where |= dict.fromkeys(some, file)
    (folder / LEGACY_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


# --- pytorch_model.bin ---


@pytest.mark.parametrize("legacy", [False, True])
def test_the_same_model_as_from_safetensors(
    legacy: bool, pickled: Path, tiny_folder: Path, state: dict[str, Tensor]
) -> None:
    file = pickled / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    want = logits(load_decoder(tiny_folder, dtype=torch.float32))
    assert torch.equal(logits(load_decoder(pickled, dtype=torch.float32)), want)


def test_shards(pickled: Path, tiny_folder: Path, state: dict[str, Tensor]) -> None:
    where = shard(pickled, state)
    want = logits(load_decoder(tiny_folder, dtype=torch.float32))
    assert torch.equal(logits(load_decoder(pickled, dtype=torch.float32)), want)
    index = pickled / LEGACY_INDEX
    first = next(iter(where))
    for file in ("../../etc/passwd", "..", "a/b.bin", "model.safetensors", "x.bin/", "\0.bin", 3):
        index.write_text(json.dumps({"weight_map": where | {first: file}}))
        with pytest.raises(FileError, match=r"but shards lie beside the index and end in \.bin"):
            open_checkpoint(pickled)
    index.write_text(json.dumps({"weight_map": where | {first: "pytorch_model.bin"}}))
    with pytest.raises(FileError, match=r"pytorch_model\.bin is no file"):
        open_checkpoint(pickled)


def test_safetensors_come_first(pickled: Path, tiny_folder: Path) -> None:
    (pickled / "pytorch_model.bin").write_bytes(b"not even looked at")
    shutil.copy(tiny_folder / "model.safetensors", pickled)
    load_decoder(pickled)


def test_half_precision_and_other_matrices_are_told_apart(
    pickled: Path, state: dict[str, Tensor]
) -> None:
    file = pickled / "pytorch_model.bin"
    torch.save({name: tensor.half() for name, tensor in state.items()}, file)
    assert open_checkpoint(pickled).dtype("blocks.0.mlp.up.weight") == torch.float16
    torch.save({name: tensor.to(torch.int8) for name, tensor in state.items()}, file)
    with pytest.raises(FileError, match="is of whole numbers"):
        open_checkpoint(pickled)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_in_it(pickled: Path, tmp_path: Path, state: dict[str, Tensor]) -> None:
    hostile = state | {"model.norm.weight": Touch(tmp_path / "trace")}
    torch.save(hostile, pickled / "pytorch_model.bin")
    with pytest.raises(FileError, match=r"it asks for posix\.mkdir but of a pickle only plain"):
        load(str(pickled))
    assert not (tmp_path / "trace").exists()


def test_into_the_book(pickled: Path, book: Book, state: dict[str, Tensor]) -> None:
    (pickled / "training_args.bin").write_bytes(b"code")
    shard(pickled, state)
    artifact = Fetch(str(pickled)).run(book, name="old")
    assert {LEGACY_INDEX, "pytorch_model-00001-of-00002.bin"} <= set(artifact.files)
    assert "training_args.bin" not in artifact.files
    assert load("old", book=book, dtype="float32").generate("hello", max_tokens=2) is not None


# --- Meta's ---

PARAMS = {"dim": 64, "multiple_of": 32, "n_heads": 4, "n_layers": 3, "norm_eps": 1e-6}
META = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def as_meta(name: str, tensor: Tensor, heads: dict[str, int]) -> tuple[str, Tensor]:
    """The inverse of what transformers' conversion of Meta's files does, written out row by row."""
    module = name.removesuffix(".weight")
    layer = ""
    if module.startswith("model.layers."):
        _, _, number, module = module.split(".", 3)
        layer = f"layers.{number}."
    if count := heads.get(module):
        size = len(tensor) // count
        rows = [h * size + i + half for h in range(count) for i in range(size // 2)
                for half in (0, size // 2)]  # fmt: skip
        tensor = tensor[rows]
    return f"{layer}{META[module]}.weight", tensor


def part(name: str, tensor: Tensor, i: int, of: int, embed_axis: int) -> Tensor:
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embed_axis}
    if tensor.ndim == 1:
        return tensor
    return tensor.chunk(of, axes.get(name.split(".")[-2], 0))[i]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of Meta's proportions, as transformers writes it: ffn = ⌈8/3·64⌉ up to a multiple of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        initializer_range=0.08,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def write_meta(
    folder: Path, source: Path, machines: int, embed_axis: int = 1, **params: Any
) -> Path:
    folder.mkdir()
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    held = load_file(source / "model.safetensors")
    state = dict(as_meta(name, tensor, heads) for name, tensor in held.items())
    for i in range(machines):
        mine = {n: part(n, t, i, machines, embed_axis).clone() for n, t in state.items()}
        mine["rope.freqs"] = torch.ones(8)
        torch.save(mine, folder / f"consolidated.0{i}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_kv_heads": 2} | params))
    return folder


@pytest.mark.parametrize(("machines", "embed_axis"), [(1, 0), (2, 1), (2, 0), (4, 1)])
def test_metas_files_are_the_model_that_transformers_has(
    machines: int, embed_axis: int, llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_meta(tmp_path / "meta", llama, machines, embed_axis, vocab_size=-1)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.config.ffn, checkpoint.config.head_dim) == (192, 16)
    assert (checkpoint.config.vocab, checkpoint.config.max_pos) == (96, 2048)
    decoder = load_decoder(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.inference_mode():
        want = theirs(torch.arange(3, 40)[None]).logits[0]
    torch.testing.assert_close(logits(decoder), want, atol=2e-5, rtol=1e-4)

    # saved as Hugging Face's, the bytes are those that transformers had
    save_hf(decoder, None, tmp_path / "hf", checkpoint.dtype)
    before, after = (load_file(f / "model.safetensors") for f in (llama, tmp_path / "hf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({"norm_eps": 1e-5}, (4096, 10_000.0, None)),
        ({"rope_theta": 1e6}, (16_384, 1e6, None)),
        ({"rope_theta": 5e5}, (8192, 5e5, None)),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, (131_072, 5e5, 32.0)),
        (
            {"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 8},
            (131_072, 5e5, 8.0),
        ),
        ({"ffn_dim_multiplier": 1.1, "vocab_size": 96}, (2048, 10_000.0, None)),
    ],
)
def test_what_params_json_leaves_out(
    params: dict[str, Any], want: tuple[Any, ...], llama: Path, tmp_path: Path
) -> None:
    config = open_checkpoint(write_meta(tmp_path / "meta", llama, 1, **params)).config
    scaling = config.rope_scaling and config.rope_scaling.factor
    assert (config.max_pos, config.rope_base, scaling) == want


def test_metas_files_that_do_not_fit(llama: Path, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", llama, 2)
    params = json.loads((folder / "params.json").read_text())
    for change, reason in (
        ({"ffn_dim_multiplier": 1.3}, r"\[192, 64\] but the config asks for \[224, 64\]"),
        ({"n_layers": 2}, "and 8 more has no place"),
        ({"n_layers": 4}, "is missing"),
        ({"dim": "64"}, "dim is '64' but must be a whole number"),
        ({"n_kv_heads": 3}, "4 heads do not divide among 3"),
        ({"moe": {"num_experts": 8}}, "the key 'moe'"),
    ):
        (folder / "params.json").write_text(json.dumps(params | change))
        with pytest.raises((FileError, FamilyError), match=reason):
            open_checkpoint(folder)
    (folder / "params.json").write_text(json.dumps(params))
    torch.save({"norm.weight": torch.ones(64)}, folder / "consolidated.01.pth")
    with pytest.raises(FileError, match="holds other tensors than consolidated"):
        open_checkpoint(folder)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    state["norm.weight"] = torch.ones(32)
    torch.save(state, folder / "consolidated.01.pth")
    with pytest.raises(FileError, match="has not the same shape"):
        open_checkpoint(folder)


def test_metas_files_into_the_book(llama: Path, tmp_path: Path, book: Book) -> None:
    folder = write_meta(tmp_path / "meta", llama, 2)
    artifact = Fetch(str(folder)).run(book, name="meta")
    assert set(artifact.files) == {"params.json", "consolidated.00.pth", "consolidated.01.pth"}
    assert open_checkpoint(resolve("meta", book)).config.vocab == 96
