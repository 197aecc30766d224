"""A stretched rotation: transformers reads what was saved and computes the same; adapters carry it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import herdbook
from herdbook.compression.merge import Merge
from herdbook.engine.engine import Engine
from herdbook.errors import ConfigError, RequestError
from herdbook.model import stretch
from herdbook.model.checkpoint import load_decoder, save_hf
from herdbook.training import peft_format
from tests.oracles.peers import differ, make, ours, prompt, theirs
from tests.training.raising import stock, tune


@pytest.mark.parametrize("kind", stretch.KINDS)
@pytest.mark.parametrize("shape", ["llama", "neox"])
def test_transformers_turns_as_we_do(kind: str, shape: str, tmp_path: Path) -> None:
    make(shape, tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    plain = ours(decoder, prompt(60))
    stretch.stretch(decoder, stretch.stretched(decoder.config, kind, 4.0))
    mine = ours(decoder, prompt(60))
    assert differ(mine, plain) > 0.01
    save_hf(decoder, None, tmp_path / "long", torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "long", dtype=torch.float32).eval()
    assert peer.config.max_position_embeddings == decoder.config.max_pos
    assert differ(theirs(peer, prompt(60)), mine) <= 3e-4
    again = load_decoder(tmp_path / "long", torch.float32)
    assert again.config == decoder.config and torch.equal(ours(again, prompt(60)), mine)
    if kind != "ntk":  # which is but another base
        with pytest.raises(ConfigError, match="stretched already"):
            stretch.stretched(again.config, kind, 2.0)


@pytest.mark.parametrize("kind", stretch.KINDS)
def test_an_adapter_carries_it_to_whoever_serves_it(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    book, _, _ = stock(tmp_path, tiny_folder)
    step = tune(rope=kind, rope_factor=4.0, dropout=0.0, save_every=99)
    adapter = step.run(book, name="long")
    about = json.loads((adapter.path / "adapter_config.json").read_text())
    assert about["max_position_embeddings"] == 2048 and "rope_theta" in about["rope_parameters"]
    tuned = herdbook.load("long", book=book, dtype="float32")
    assert tuned.config == stretch.stretched(load_decoder(tiny_folder).config, kind, 4.0)
    merged = Merge(model="base", adapter="long").run(book, name="whole")
    whole = herdbook.load("whole", book=book, dtype="float32")
    peer = AutoModelForCausalLM.from_pretrained(merged.path, dtype=torch.float32).eval()
    ids = tuned.render([{"role": "user", "content": "who are you " * 20}], reply=True).ids
    torch.testing.assert_close(tuned.logits(ids), whole.logits(ids), atol=1e-3, rtol=0)
    assert differ(theirs(peer, ids), whole.logits(ids)) <= 1e-3
    assert tuned.generate("who are you", max_tokens=6) == whole.generate(
        "who are you", max_tokens=6
    )
    base = herdbook.load("base", book=book, dtype="float32")
    with pytest.raises(RequestError, match="trained with a stretched rotation"):
        Engine(base.decoder, base.tokenizer).load_adapter("one", adapter.path)
    without = load_decoder(tiny_folder, torch.float32)
    for key in ("rope_parameters", "max_position_embeddings"):
        del about[key]
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "adapter_config.json").write_text(json.dumps(about))
    (copied / "adapter_model.safetensors").write_bytes(
        (adapter.path / "adapter_model.safetensors").read_bytes()
    )
    peft_format.load(without, copied)
    assert differ(ours(without, ids), tuned.logits(ids)) > 1e-3  # it would say something else


def test_what_cannot_be() -> None:
    for how in (
        {"rope": "yarn"},
        {"rope_factor": 2.0},
        {"rope": "ntk", "rope_factor": float("inf")},
    ):
        with pytest.raises(ConfigError, match="by a finite factor above 1"):
            tune(**how).check()
    with pytest.raises(ConfigError, match="whose rotation stays"):
        tune(rope="yarn", rope_factor=2.0, method="peqa").check()
