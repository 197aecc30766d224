"""Trained prefixes and prompts: peft computes with ours, and we with its, in a pack and in the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from herdbook.engine.engine import Engine
from herdbook.errors import FileError
from herdbook.model.checkpoint import load_decoder
from herdbook.model.layout import Packed
from herdbook.model.soft import Prefix, Prompt, apply_soft
from herdbook.training import peft_format
from tests.oracles.peers import differ, make, ours, prompt, theirs
from tests.oracles.shapes import SHAPES

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

KINDS = {"prefix": Prefix, "prompt": Prompt}
#: where the two cannot meet. transformers keeps Falcon's keys once for every query head, or peft takes
#: it to; and peft's prompt is as wide as OPT-350m's hidden state, which its embedding is not
APART = {
    "ours": ("falcon-40b-prefix", "falcon-11b-prefix"),
    "theirs": ("falcon-7b-prefix", "falcon-40b-prefix", "falcon-11b-prefix", "opt-350m-prompt"),
}
CONFIGS = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_peft_computes_with_ours(shape: str, kind: str, tmp_path: Path) -> None:
    base = make(shape, tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    untuned = ours(decoder, prompt(20))
    soft = apply_soft(decoder, KINDS[kind], 6)
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.normal_()
    tuned = ours(decoder, prompt(20))
    assert differ(tuned, untuned) > 0.05
    peft_format.save(decoder, tmp_path / "adapter", base="base")
    if f"{shape}-{kind}" not in APART["ours"]:
        peer = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert differ(theirs(peer, prompt(20))[-20:], tuned) <= 3e-4
    back = load_decoder(tmp_path / "base", torch.float32)
    peft_format.load(back, tmp_path / "adapter")
    assert differ(ours(back, prompt(20)), tuned) <= 1e-6

    # documents of a pack see it each, and the engine has it in pages
    ids = [prompt(9), prompt(20), prompt(9, 3)]
    with torch.inference_mode():
        flat = torch.tensor([one for some in ids for one in some])
        packed = decoder.logits(decoder(flat, Packed([9, 20, 9])))
    assert differ(packed, torch.cat([ours(decoder, one) for one in ids])) <= 2e-4
    engine = Engine(decoder, None, page_tokens=4, max_batch_tokens=16)
    for text, wanted in zip(ids, torch.split(packed, [9, 20, 9]), strict=True):
        scores = engine.score(text[:1], [text[1:]])[0]
        chances = wanted[:-1].log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        assert scores.logprobs == pytest.approx(chances.tolist(), abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_we_compute_with_peft_s(shape: str, kind: str, tmp_path: Path) -> None:
    base = make(shape, tmp_path / "base")
    config = CONFIGS[kind](num_virtual_tokens=5, task_type="CAUSAL_LM")
    torch.manual_seed(2)
    peer = get_peft_model(base, config).eval()
    peer.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    if f"{shape}-{kind}" in APART["theirs"]:
        with pytest.raises(FileError, match=r"but 5 virtual tokens of this base model ask for \[5"):
            peft_format.load(decoder, tmp_path / "adapter")
        return
    peft_format.load(decoder, tmp_path / "adapter")
    assert differ(ours(decoder, prompt(20)), theirs(peer, prompt(20))[-20:]) <= 3e-4
