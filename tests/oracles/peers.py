"""Both sides of a comparison: random models of transformers, ours loaded from them, what each gives."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Packed
from tests.oracles.shapes import SHAPES, VOCAB


def random_model(name: str, settings: dict[str, Any], seed: int) -> Any:
    """A model of transformers, its biases and norms made random too."""
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings)).eval().float()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias") or "norm" in key or "ln_" in key:
                value.add_(torch.randn_like(value) * 0.3)
    return model


def make(shape: str, folder: Path) -> Any:
    """The random model of a row of SHAPES, saved by transformers."""
    name, settings = SHAPES[shape]
    model = random_model(name, settings, sum(map(ord, shape)))
    model.save_pretrained(folder)
    return model


def again(model: Any, folder: Path) -> Any:
    """The same class of transformers, loaded from a folder of ours; every tensor has its place."""
    config = type(model.config).from_pretrained(folder)
    config.pad_token_id = 0  # GLM's own is beyond so small a vocabulary
    found, report = type(model).from_pretrained(
        folder,
        config=config,
        output_loading_info=True,
        attn_implementation=model.config._attn_implementation,
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found.eval().float()


@torch.inference_mode()
def ours(decoder: Decoder, ids: list[int]) -> Tensor:
    return decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))


@torch.inference_mode()
def theirs(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


@torch.inference_mode()
def theirs_padded(model: Any, prompts: list[list[int]]) -> list[Tensor]:
    """The logits of each prompt, of all in one batch that is padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(**inputs).logits
    return [logits[row, longest - len(one) :] for row, one in enumerate(prompts)]


def prompt(length: int, seed: int = 7) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def saved_bytes_agree(theirs: Path, ours: Path) -> None:
    """The folders hold the same tensors, in however many shards."""
    first, second = (
        {
            name: one
            for file in folder.glob("*.safetensors")
            for name, one in load_file(file).items()
        }
        for folder in (theirs, ours)
    )
    assert first and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def cached_replies_agree(decoder: Decoder, model: Any) -> None:
    """Prompts of several lengths at once, prefilled in chunks, decoded from pages; then a second turn
    each, whose beginning lies in pages already."""
    engine = Engine(decoder, None, page_tokens=4, max_batch_tokens=16)
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    prompts = [prompt(length, length) for length in (1, 37, 5, 18)]
    for turn in range(2):
        replies = engine.generate([Request(ids, sampling) for ids in prompts])
        for number, (ids, reply) in enumerate(zip(prompts, replies, strict=True)):
            whole = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=-1,
            )[0].tolist()
            assert list(reply.ids) == whole[len(ids) :]
            assert (reply.cached_tokens > 0) == (turn == 1)
            prompts[number] = [*whole, *prompt(5, number)]
