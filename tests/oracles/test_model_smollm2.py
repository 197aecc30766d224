"""The real SmolLM2: its GGUF loaded, saved as a Hugging Face folder, computed by transformers."""

from __future__ import annotations

from pathlib import Path

import gguf as peer
import numpy as np
import pytest
import torch
import transformers

from herdbook.files import gguf
from herdbook.model.checkpoint import load_decoder, save_gguf, save_hf
from herdbook.model.decoder import Decoder
from herdbook.tokens.tokenizer import Tokenizer
from tests.oracles.peers import differ, ours, theirs

TEXT = "The herd book is the register in which breeders write down every animal. 牛群登记册。" * 3


@pytest.fixture(scope="module")
def decoder(smollm2_path: Path) -> Decoder:
    return load_decoder(smollm2_path, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids(smollm2_path: Path) -> list[int]:
    return Tokenizer.load(smollm2_path).encode(TEXT)


def test_logits_equal_those_of_transformers(
    decoder: Decoder, ids: list[int], tmp_path: Path
) -> None:
    save_hf(decoder, None, tmp_path, torch.float32)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    want, got = theirs(model.float(), ids), ours(decoder, ids)
    assert differ(got, want) <= 1e-4 and torch.equal(got.argmax(-1), want.argmax(-1))


def test_the_reader_agrees_with_the_gguf_package(smollm2_path: Path) -> None:
    ours, theirs = gguf.read(smollm2_path), peer.GGUFReader(smollm2_path)
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for one in theirs.tensors[:8]:
        found = ours.tensors[one.name]
        assert (found.offset, found.nbytes) == (one.data_offset, one.n_bytes)
        want = peer.dequantize(one.data, one.tensor_type)
        np.testing.assert_array_equal(ours.array(one.name), want.reshape(found.shape))
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    long = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"}
    for key in set(keys) - long:
        assert ours.metadata[key] == theirs.fields[key].contents(), key
    assert [len(ours.metadata[key]) for key in sorted(long)] == [48900, 49152, 49152]
    assert ours.metadata["tokenizer.ggml.merges"][:2] == ["Ġ t", "Ġ a"]


def test_a_matrix_on_the_q4_1_grid_comes_back_unchanged(
    decoder: Decoder, smollm2_path: Path, tmp_path: Path
) -> None:
    """Dequantised to float32 and quantised again: every block has the very same bytes."""
    path = tmp_path / "again.gguf"
    save_gguf(decoder, Tokenizer.load(smollm2_path), path, "Q4_1")
    before, after = gguf.read(smollm2_path), gguf.read(path)
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert after.tensors[name].type == tensor.type
        assert np.array_equal(after.raw(name), before.raw(name)), name
    for key in ("tokens", "merges", "token_type", "pre", "bos_token_id", "eos_token_id"):
        assert after.metadata[f"tokenizer.ggml.{key}"] == before.metadata[f"tokenizer.ggml.{key}"]


def test_the_quantised_decoder_is_the_dequantised_one(
    decoder: Decoder, ids: list[int], smollm2_path: Path
) -> None:
    quantised = load_decoder(smollm2_path, dtype=torch.float32, quantised=True)
    # many rows: the same numbers are multiplied
    assert differ(ours(quantised, ids), ours(decoder, ids)) <= 1e-3
    # few rows: the kernel computes in bfloat16
    few_got, few_want = ours(quantised, ids[:8]), ours(decoder, ids[:8])
    assert differ(few_got, few_want) <= 0.05 * few_want.abs().max()
    close = torch.nn.functional.kl_div(
        few_got.log_softmax(-1), few_want.log_softmax(-1), log_target=True, reduction="none"
    )
    assert close.sum(-1).max() <= 0.02
