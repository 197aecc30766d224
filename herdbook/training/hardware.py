"""Planning on paper: graphics cards by their data sheets, published shapes, and how much of a card's
peak a stack of software turns into useful arithmetic.

    seconds = tokens · FLOPs a token / (cards · peak · share)

Useful arithmetic is the model's own: for each weight that multiplies a token 2 operations forward, 2
for the gradient of what enters and 2 for its own, where it learns; attention's half square; nothing for
what is computed twice. So a `share` is what the literature
calls model FLOPs utilisation. There is one for each stack and none for a single row. Its source is
another run than those that the tests compare with, but was chosen with them in view (docs/planning.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from herdbook.errors import CapacityError, ConfigError, UnknownName, nearest
from herdbook.model.checkpoint import expected_shapes
from herdbook.model.config import DecoderConfig
from herdbook.training.activations import eager_bytes
from herdbook.training.planning import Memory


@dataclass(frozen=True)
class Card:
    flops: float  # of bfloat16 with float32 sums, dense, a second
    memory: float  # bytes


#: NVIDIA's data sheets (A100 2020, H100 2022, H200 2023) and architecture papers (GA102, AD102)
CARDS = {
    "A100-40GB": Card(312e12, 40e9),
    "A100-80GB": Card(312e12, 80e9),
    "H100-80GB": Card(989e12, 80e9),
    "H200-141GB": Card(989e12, 141e9),
    "RTX-3090": Card(71e12, 24e9),
    "RTX-4090": Card(165.2e12, 24e9),
    "RTX-A6000": Card(154.8e12, 48e9),
}

#: tuned: fused or compiled kernels, little waiting. The middle of 42.1 % and 54.2 %, with and without
#: recomputation, of Megatron-LM's 530 billion weights on 2,240 A100 (arXiv:2205.05198).
#: plain: a script of early 2023 (transformers' Trainer, FSDP, padded rows): LLaMA-7B on Alpaca's rows
#: with two A100-80GB took about ten hours (stanford_alpaca's issue 41), its rows counted as 512 tokens.
STACKS = {"tuned": 0.48, "plain": 0.142}


def _llama(hidden: int, layers: int, heads: int, ffn: int) -> DecoderConfig:
    return DecoderConfig(32_000, hidden, layers, heads, heads, hidden // heads, ffn, 2048)


SHAPES = {
    "llama-7b": _llama(4096, 32, 32, 11_008),
    "llama-13b": _llama(5120, 40, 40, 13_824),
    "llama-30b": _llama(6656, 60, 52, 17_920),
    "llama-65b": _llama(8192, 80, 64, 22_016),
    "llama-2-7b": _llama(4096, 32, 32, 11_008),
    "llama-3.1-8b": DecoderConfig(128_256, 4096, 32, 32, 8, 128, 14_336, 131_072),
}


def shape(name: str) -> DecoderConfig:
    if name not in SHAPES:
        raise UnknownName(f"shape {name!r}", rule="is not known", next=nearest(name, list(SHAPES)))
    return SHAPES[name]


def machine(text: str) -> tuple[int, Card]:
    """«8xA100-80GB» → 8 and the card."""
    found = re.fullmatch(r"(?:([0-9]+)\s*[x×])?\s*(.+)", text.strip())
    count, name = (int(found[1] or 1), found[2]) if found else (0, text)
    if not count or name not in CARDS:
        raise ConfigError(
            f"--on is {text!r}",
            rule="but must be cards as 8xA100-80GB",
            next=nearest(name, list(CARDS)),
        )
    return count, CARDS[name]


def share_of(stack: str) -> float:
    if stack not in STACKS:
        raise UnknownName(
            f"stack {stack!r}", rule="is not known", next=nearest(stack, list(STACKS))
        )
    return STACKS[stack]


def weights_of(config: DecoderConfig) -> int:
    return sum(torch.Size(one).numel() for one in expected_shapes(config).values())


def flops_a_token(config: DecoderConfig, length: int, *, frozen: bool) -> float:
    """frozen: the weights do not learn (adapters beside them cost next to nothing). length: tokens of a
    row, each of which sees half of the row on average."""
    looked_up = 0 if config.tied else config.vocab * config.hidden
    multiplied = weights_of(config) - looked_up
    attention = 6 * config.layers * config.heads * config.head_dim * length
    return (4 if frozen else 6) * multiplied + attention


def tokens_per_second(
    config: DecoderConfig, card: Card, stack: str, length: int, *, frozen: bool = False
) -> float:
    """Of one card."""
    return card.flops * share_of(stack) / flops_a_token(config, length, frozen=frozen)


def card_memory(
    config: DecoderConfig,
    tokens: int,
    *,
    method: str,
    nf4: bool = False,
    recompute: bool = False,
    dropout: bool = False,
    rank: int = 8,
    fused: bool = False,
    cards: int = 1,
) -> Memory:
    """Bytes on one of `cards` that share weights, gradients and optimiser's state (FSDP).

    method: full, or lora of `rank` on q and v. tokens: computed at once on a card. Weights, gradients and Adam's moments in bfloat16. fused: the
    step is taken within the backward pass, moments of 8 bits wait in the host's memory (torchtune on
    one card), and logits are made an eighth at a time. dropout: of LoRA, whose inputs are then kept a
    second time, with their mask. Matrices in NF4 with float32 scales of 64.
    """
    shapes = expected_shapes(config)
    sizes = {name: torch.Size(one).numel() for name, one in shapes.items()}
    inside = sum(
        n for name, n in sizes.items() if name.startswith("blocks.") and len(shapes[name]) > 1
    )
    total = sum(sizes.values())
    weights = 2 * total if not nf4 else 2 * (total - inside) + inside * (0.5 + 4 / 64)
    trained = total
    if method == "lora":
        named = [
            one
            for name, one in shapes.items()
            if name.endswith(("attention.q.weight", "attention.v.weight"))
        ]
        trained = sum(rank * sum(one) for one in named)
        weights += 2 * trained
    gradients: float = 2 * trained
    state: float = 4 * trained
    if fused and method == "full":
        gradients, state = 2 * max(sizes.values()), 0
    block = eager_bytes(config, 2) * tokens
    if dropout:
        block += 3 * config.hidden * tokens
    kept = block * config.layers
    if recompute:
        kept = 2 * config.hidden * tokens * config.layers + block
    logits = tokens * config.vocab * 10 / (8 if fused else 1)
    dense = 2 * config.ffn * config.hidden if nf4 else 0
    return Memory(
        process=0,
        weights=int(weights / cards),
        gradients=int(gradients / cards),
        optimiser=int(state / cards),
        activations=int(kept),
        work=int(logits + dense),
    )


def too_small(needed: float, card: Card, enough: int | None) -> CapacityError:
    """enough: so many cards would do."""
    return CapacityError(
        f"a card would hold {needed / 1e9:.1f} GB",
        rule=f"and it has {card.memory / 1e9:.0f}",
        next=f"take {enough} cards" if enough else "take larger cards, or a smaller model",
    )
