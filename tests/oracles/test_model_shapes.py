"""Every decoder that transformers knows against it: logits, cached replies, what we save; GGUF and back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import FamilyError
from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_gguf, save_hf
from herdbook.model.families import families
from herdbook.model.layout import Packed
from tests.oracles.peers import (
    again,
    cached_replies_agree,
    differ,
    make,
    ours,
    prompt,
    saved_bytes_agree,
    theirs,
    theirs_padded,
)
from tests.oracles.shapes import IN_GGUF, NOT_IN_GGUF, SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_what_we_save(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs", dtype=torch.float32)
    want, got = theirs(model, prompt(150)), ours(decoder, prompt(150))
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert want.std() > 0.5, "the oracle says something"
    assert differ(got, want) <= 1e-4

    save_hf(decoder, None, tmp_path / "ours", torch.float32, shard_bytes=60_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1, "it is sharded"
    saved_bytes_agree(tmp_path / "theirs", tmp_path / "ours")
    assert torch.equal(
        theirs(again(model, tmp_path / "ours"), prompt(40)), theirs(model, prompt(40))
    )
    back = load_decoder(tmp_path / "ours", dtype=torch.float32)
    assert torch.equal(ours(back, prompt(40)), ours(decoder, prompt(40)))
    assert back.config == decoder.config

    # written from the axes alone, as after a GGUF
    decoder.source_config = {}
    save_hf(decoder, None, tmp_path / "axes", torch.float32)
    assert differ(theirs(again(model, tmp_path / "axes"), prompt(150)), want) <= 1e-4
    assert open_checkpoint(tmp_path / "axes").config == decoder.config


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_replies(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path)
    cached_replies_agree(load_decoder(tmp_path, dtype=torch.float32), model)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_different_lengths(shape: str, tmp_path: Path) -> None:
    """Theirs padded on the left, ours end to end without padding."""
    model = make(shape, tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    prompts = [prompt(length, length) for length in (1, 37, 5, 18)]
    lengths = [len(one) for one in prompts]
    ids = torch.tensor([id for one in prompts for id in one])
    with torch.inference_mode():
        got = decoder.logits(decoder(ids, Packed(lengths)))
    for mine, want in zip(got.split(lengths), theirs_padded(model, prompts), strict=True):
        assert differ(mine, want) <= 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_stays_as_near_as_theirs(shape: str, tmp_path: Path) -> None:
    """With experts by the median: a close choice falls otherwise, and a token's logits are others."""
    model = make(shape, tmp_path)
    ids = prompt(60)
    want = theirs(model, ids)
    decoder = load_decoder(tmp_path, dtype=torch.bfloat16)
    peer = (theirs(model.bfloat16(), ids).float() - want).abs()
    mine = (ours(decoder, ids) - want).abs()
    if decoder.config.experts:
        assert mine.median() <= 1.5 * peer.median()
    else:
        assert mine.mean() <= 1.5 * peer.mean()
    # paged, with ALiBi's bias and masks in bfloat16 too
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    engine = Engine(decoder, None, page_tokens=4, max_batch_tokens=16)
    replies = engine.generate([Request(ids[:n], sampling) for n in (1, 30, 9)])
    assert all(len(reply.ids) == 4 for reply in replies)


@pytest.mark.parametrize("shape", IN_GGUF)
def test_gguf_and_back(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    save_gguf(decoder, None, tmp_path / "model.gguf", "F32")
    back = load_decoder(tmp_path / "model.gguf", dtype=torch.float32)
    assert differ(ours(back, prompt(150)), ours(decoder, prompt(150))) <= 1e-5
    assert back.config == decoder.config
    save_hf(back, None, tmp_path / "hf", torch.float32)
    want = theirs(model, prompt(150))
    assert differ(theirs(again(model, tmp_path / "hf"), prompt(150)), want) <= 1e-4


@pytest.mark.parametrize("shape", NOT_IN_GGUF)
def test_what_gguf_cannot_say_is_refused(shape: str, tmp_path: Path) -> None:
    make(shape, tmp_path)
    with pytest.raises(FamilyError, match=NOT_IN_GGUF[shape]):
        save_gguf(load_decoder(tmp_path), None, tmp_path / "model.gguf", "F32")
    assert not (tmp_path / "model.gguf").exists()


def test_falcons_slopes_are_rounded_as_in_its_training(tmp_path: Path) -> None:
    """Past 256 tokens bfloat16 tells neighbours no longer apart: the rounded products count."""
    model = make("falcon-rw", tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    assert differ(ours(decoder, prompt(700)), theirs(model, prompt(700))) <= 1e-4


def test_every_decoder_that_transformers_knows_has_a_shape() -> None:
    """RWKV, T5 and Switch have tests of their own; what transformers does not know, twins and others."""
    named = {family.architecture for family in families().values()}
    known = {name for name in named if hasattr(transformers, name)}
    assert {name for name, _ in SHAPES.values()} == {
        name for name in known if not re.match("Rwkv|T5|Switch", name)
    }
