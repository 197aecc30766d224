"""What of a model is trained: the tuning methods. The loop gets the parameters that move, whichever.

    lora    low-rank corrections of matrices (rslora, dora: how they are scaled)   → adapter
    ia3     factors on keys, values and what the MLP's last matrix reads           → adapter
    peqa    the scales of matrices that the base keeps in 4 or 8 bits              → adapter
    prefix  keys and values of virtual tokens, in every layer                      → adapter
    prompt  embeddings of virtual tokens                                           → adapter
    freeze  some weights of the model itself: last blocks, named parts             → model
    full    all of them                                                            → model

Beside an adapter, the embedding and the head can be trained whole, or the rows of new tokens alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from herdbook.errors import ConfigError, nearest
from herdbook.model import ia3
from herdbook.model.decoder import Decoder
from herdbook.model.dora import DoRALinear
from herdbook.model.lora import TARGETS, LoRALinear, apply_lora
from herdbook.model.peqa import FewBits, apply_peqa
from herdbook.model.soft import Prefix, Prompt, Soft, apply_soft
from herdbook.model.stretch import stretch, stretched
from herdbook.model.whole import train_rows, train_whole

if TYPE_CHECKING:
    from herdbook.training.tune import Tune

#: those that train the model's own weights, and have no base beside it
WEIGHTS = ("freeze", "full")
#: those that put something onto matrices
MATRICES = ("lora", "ia3", "peqa")
SOFT: dict[str, type[Soft]] = {"prefix": Prefix, "prompt": Prompt}


def check(how: Tune) -> None:
    """Refuse settings that cannot be, before a model is loaded."""
    for target in how.targets:
        if target not in TARGETS:
            raise ConfigError(
                f"target {target!r}",
                rule="is no matrix of a block",
                next=nearest(target, tuple(TARGETS)),
            )
    for name in how.whole:
        if name not in ("embed", "head"):
            raise ConfigError(
                f"tune.whole names {name!r}",
                rule="and only the embedding and the head are trained whole beside an adapter",
                next="name embed or head, or set method to freeze and name parts",
            )
    belong = {
        "rslora": ("lora",), "dora": ("lora",), "parts": ("freeze",),
        "rows_from": ("lora", "ia3", "freeze"), "prefix_projection": ("prefix",),
        "targets": MATRICES, "whole": ("lora", "ia3"), "last_layers": (*MATRICES, "freeze"),
    }  # fmt: skip
    for field, owners in belong.items():
        if getattr(how, field) and how.method not in owners:
            raise ConfigError(
                f"tune.{field} is {getattr(how, field)}",
                rule=f"which says nothing to method {how.method}",
                next=f"leave it out, or set method to {' or '.join(owners)}",
            )
    if how.rows_from and not {"embed", "head"} & {*how.whole, *how.parts}:
        raise ConfigError(
            f"tune.rows_from is {how.rows_from}",
            rule="but neither the embedding nor the head is trained, which alone have rows for tokens",
            next="name embed (and head) in "
            + ("parts" if how.method == "freeze" else "whole")
            + ", or leave rows_from out",
        )
    if how.method != "full" and how.precision != "float32":
        raise ConfigError(
            f"tune.precision is {how.precision} and tune.method is {how.method}",
            rule="but only full tuning moves so many weights that their precision costs anything",
            next="leave precision out, or set method to full",
        )
    scales = how.method == "peqa" and how.base == "packaged"
    if how.base != "dense" and not scales and (how.method != "lora" or how.dora or how.whole):
        beside = "dora" if how.dora else "whole" if how.whole else how.method
        raise ConfigError(
            f"tune.base is {how.base} beside {beside}",
            rule="but only plain LoRA is trained beside weights in few bits",
            next="set method to lora, without dora and whole, or base to dense",
        )
    if "base" in how.offload:
        wrong = {
            "method": how.method not in ("lora", "ia3", "prefix", "prompt"),
            "base": how.base != "dense",
            "dora": how.dora,
        }
        for name in (name for name, one in wrong.items() if one):
            raise ConfigError(
                f"tune.offload is base and tune.{name} is {getattr(how, name)}",
                rule="but only dense blocks that stay as they are, beside lora, ia3, prefix or prompt, "
                "are read from disk as they compute",
                next=f"leave {name} out, or offload",
            )
    if bool(how.rope) != (how.rope_factor > 1) or how.rope_factor == math.inf:
        raise ConfigError(
            f"tune.rope is {how.rope!r} and tune.rope_factor is {how.rope_factor:g}",
            rule="but a rotation is stretched in one of the ways, by a finite factor above 1",
            next="set both, as rope yarn and rope_factor 4, or neither",
        )
    if how.rope and how.method == "peqa":
        raise ConfigError(
            f"tune.rope is {how.rope} and tune.method is peqa",
            rule="but its scales go into the base's own file, whose rotation stays",
            next="set method to lora, or leave rope out",
        )
    if how.method == "freeze" and not (how.parts or how.last_layers):
        raise ConfigError(
            "method freeze without parts and last_layers",
            rule="would train every weight",
            next="set last_layers or parts, or method to full",
        )


def prepare(decoder: Decoder, how: Tune, *, minima: bool = False) -> dict[str, nn.Parameter]:
    """Put what is trained onto the decoder; its parameters by name, and they alone have gradients.

    minima: how the base's file keeps its blocks (see `peqa.PEQALinear`).
    """
    decoder.train()
    if how.rope:
        stretch(decoder, stretched(decoder.config, how.rope, how.rope_factor))
    if how.method == "full":
        decoder.requires_grad_(True)
    elif how.method == "freeze":
        _choose(decoder, how.parts, how.last_layers)
    elif how.method == "ia3":
        ia3.apply_ia3(decoder, targets=how.targets or ia3.TARGETS, last_layers=how.last_layers)
    elif how.method == "peqa":
        if not any(isinstance(one, FewBits) for one in decoder.modules()):
            raise ConfigError(
                "tune.method is peqa, and the model keeps no matrix in 4 or 8 bits",
                rule="so there are no scales to train",
                next="quantise it first (step Quantise), or set method to lora",
            )
        names = how.targets or tuple(TARGETS)
        apply_peqa(decoder, targets=names, minima=minima, last_layers=how.last_layers)
    elif how.method in SOFT:
        _soft(decoder, how)
    else:
        _lora(decoder, how)
    for name in ("embed", "head"):
        chosen = name in how.whole
        if chosen:
            _need_head(decoder, name)
        elif how.method == "freeze" and how.rows_from:
            layer = getattr(decoder, name)
            chosen = layer is not None and layer.weight.requires_grad
        if chosen and how.rows_from:
            train_rows(decoder, name, _rows(decoder, how.rows_from))
        elif chosen:
            train_whole(decoder, name)
    moving = {name: one for name, one in decoder.named_parameters() if one.requires_grad}
    if not moving:
        raise ConfigError(
            f"tune.parts is {how.parts} and tune.last_layers is {how.last_layers}",
            rule="and no weight of this model is in both",
            next="raise last_layers, or name other parts",
        )
    return moving


def _lora(decoder: Decoder, how: Tune) -> None:
    config = decoder.config
    for size in (config.hidden, config.heads * config.head_dim, config.ffn):
        if size % how.group:
            raise ConfigError(
                f"tune.group is {how.group}",
                rule=f"and does not divide the {size} inputs of one of the model's matrices",
                next="set group to 1",
            )
    apply_lora(
        decoder,
        targets=how.targets or tuple(TARGETS),
        rank=how.rank,
        alpha=how.alpha,
        dropout=how.dropout,
        group=how.group,
        rslora=how.rslora,
        kind=DoRALinear if how.dora else LoRALinear,
        last_layers=how.last_layers,
        seed=how.seed,
    )


def _soft(decoder: Decoder, how: Tune) -> None:
    config, most = decoder.config, how.length + how.virtual_tokens
    if config.position == "learned" and most > config.max_pos:
        raise ConfigError(
            f"rows of {how.length} tokens behind {how.virtual_tokens} virtual ones",
            rule=f"need more than the {config.max_pos} places that this model has learnt",
            next=f"set length to {config.max_pos - how.virtual_tokens}",
        )
    kind, projection = SOFT[how.method], how.prefix_projection
    apply_soft(decoder, kind, how.virtual_tokens, how.seed, projection)


def _rows(decoder: Decoder, first: int) -> Tensor:
    """The ids from this one on."""
    vocab = decoder.config.vocab
    if first >= vocab:
        raise ConfigError(
            f"tune.rows_from is {first:,}",
            rule=f"but this model's vocabulary has {vocab:,} tokens, none of them new",
            next="extend it first: herd tokenizer extend",
        )
    return torch.arange(first, vocab)


def _need_head(decoder: Decoder, name: str) -> None:
    if name == "head" and decoder.head is None:
        raise ConfigError(
            "tune.whole names the head",
            rule="which this model ties to its embedding: one matrix is both",
            next="name embed",
        )


def _choose(decoder: Decoder, parts: tuple[str, ...], last_layers: int) -> None:
    """Freeze all but the parameters whose name has one of the `parts` in it (none: any name has);
    with `last_layers`, of blocks only in that many of the last."""
    decoder.requires_grad_(False)
    first = len(decoder.blocks) - last_layers if last_layers else 0
    known: set[str] = set()
    for name, parameter in decoder.named_parameters():
        pieces = name.split(".")
        inside = pieces[0] == "blocks"
        known |= {one for one in pieces if not one.isdigit()} - {"blocks", "weight"}
        named = any(f".{part}." in f".{name}." for part in parts)
        if inside:
            parameter.requires_grad_((named or not parts) and int(pieces[1]) >= first)
        else:
            parameter.requires_grad_(named)
    for part in parts:
        if not any(f".{part}." in f".{name}." for name, _ in decoder.named_parameters()):
            raise ConfigError(
                f"tune.parts names {part!r}",
                rule="and no weight of this model has that in its name",
                next=nearest(part, sorted(known)),
            )
