"""How far a changed model is from its original, on a short text that ships with Herdbook.

T tokens · V vocabulary. A smoke test that takes a second, not a judgement of quality: that is the
report's business. What it catches is a wrong name, a transposed or permuted matrix, a lost bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from herdbook.errors import GateError
from herdbook.model.checkpoint import one_tensor, open_checkpoint
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Packed
from herdbook.tokens.tokenizer import Tokenizer

TEXT = (
    "A herd book is the register in which breeders write down every animal with its parents. "
    "In 1822 the first one for cattle appeared; it held 710 bulls.\n"
    "登记簿记录每一头牲畜的父母、出生日期和毛色。没有登记的牲畜，就说不清它的来历。\n"
    "def parents(animal, book):\n    return [book[name] for name in animal.parents]\n"
    "Question: What is 17 + 25? Answer: 42. The capital of France is Paris, and water boils at "
    "100 degrees Celsius at sea level.\n"
)


@dataclass(frozen=True)
class Parity:
    """The difference of two models over the same text."""

    max_logit_difference: float
    scale: float  # the original's largest logit: differences are judged against it
    mean_kl: float  # nats a token, KL(original ‖ changed)
    top1_agreement: float  # share of tokens whose likeliest successor is the same


#: the most that a format's rounding may move a tensor, as a share of its norm. A permuted or
#: transposed tensor is off by more than 1.
ROUNDING = {
    "F32": 1e-6,
    "F16": 2e-3,
    "BF16": 2e-2,
    "Q8_0": 0.03,
    "Q4_1": 0.25,
    "Q4_0": 0.35,
    "int8": 0.03,
    "int4": 0.25,
}


@torch.no_grad()
def check_written(decoder: Decoder, path: Path, quant: str) -> float:
    """Hold every tensor of a file that was written against the decoder's; the largest share.

    GateError where one is off by more than the format's rounding explains.
    """
    checkpoint, worst = open_checkpoint(path), (0.0, "")
    for name in checkpoint.names:
        wanted = one_tensor(decoder, name, torch.float32)
        found = checkpoint.read(name, torch.float32)
        if name == "head.weight" and decoder.config.head_norm:  # only its rows' directions count
            wanted, found = normalize(wanted), normalize(found)
        off = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
        worst = max(worst, (off, name))
    check_rounding(f"{worst[1]} of {path.name}", worst[0], quant)
    return worst[0]


def check_rounding(name: str, off: float, quant: str) -> None:
    """GateError where a tensor is off by more than the format's rounding explains."""
    if not off <= ROUNDING[quant]:
        raise GateError(
            f"tensor {name} is off by {off:.3g} of its norm",
            rule=f"more than the {ROUNDING[quant]:g} that rounding to {quant} explains",
            next="please report this, with the name of the model",
        )


@torch.no_grad()
def text_logits(decoder: Decoder, tokenizer: Tokenizer | None) -> Tensor:
    """float32 [T, V] over the text (over ids 0 … 63 where a model has no tokenizer).

    Its second half is what a model that answers says to its first.
    """
    was_training = decoder.training
    decoder.eval()
    ids = tokenizer.encode(TEXT) if tokenizer else [n % decoder.config.vocab for n in range(64)]
    half = len(ids) // 2
    ids = decoder.examples(ids, [False] * half + [True] * (len(ids) - half))[0][0]
    hidden = decoder(torch.tensor(ids, device=decoder.device), Packed([len(ids)], decoder.device))
    decoder.train(was_training)
    return decoder.logits(hidden)


def compare(original: Tensor, changed: Tensor) -> Parity:
    """Both float32 [T, V]."""
    a, b = original.log_softmax(-1), changed.log_softmax(-1)
    return Parity(
        max_logit_difference=float((original - changed).abs().max()),
        scale=float(original.abs().max()),
        mean_kl=max(0.0, float((a.exp() * (a - b)).sum(-1).mean())),
        top1_agreement=float((original.argmax(-1) == changed.argmax(-1)).float().mean()),
    )
