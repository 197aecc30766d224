"""Low-rank adapters: a frozen linear layer that learns a small correction.

Shapes: T tokens · I inputs · O outputs · r rank · g inputs of a group

    y = x Wᵀ + (alpha / r) · (x Aᵀ) Bᵀ        W [O, I] frozen, A [r, I], B [O, r] trained

B starts at zero, so the first step starts from the very model that was loaded. For SmolLM2 a rank
of 8 on all seven matrices of a block trains 2.4 of 134.5 million numbers, and the gradient of the
big ones is never computed. Hu et al., "LoRA", 2021 (arXiv:2106.09685).

**Groups.** With `group` = 32, the 32 inputs that share a block of GGUF's Q4_1 (w = scale · code +
minimum) share a column of A too. Then B A is constant within a block, so merging moves nothing but
the block's minimum: a model that lies on the 4-bit grid lies on it still, and 4 bits lose nothing
of what was learnt. A plain adapter moves each weight by a few hundredths of a step, which rounding
puts back: the model forgets what it was taught. Xu et al., "QA-LoRA", 2023 (arXiv:2309.14717). To
other libraries it is a plain adapter whose A happens to repeat each column 32 times.

What multiplies is in herdbook/model/low_rank.py; `LoRALinear.plain` is its twin. Adapters that read
the same (q, k and v; gate and up) do it as one: `together`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from herdbook.model.low_rank import low_rank, product, side_by_side

#: where each of a block's matrices lives
TARGETS = {
    "q": "attention.q",
    "k": "attention.k",
    "v": "attention.v",
    "o": "attention.o",
    "gate": "mlp.gate",
    "up": "mlp.up",
    "down": "mlp.down",
}

#: matrices that read the same as another one, in the order in which they are taken together
BESIDE = {"q": ("k", "v"), "gate": ("up",)}


class Adapter(nn.Module):
    """A frozen layer (`base`) that learns something beside itself; its other parameters are trained."""

    base: nn.Module
    bypassed = False

    def merge(self) -> nn.Module:
        """The base with what was learnt in it, in the base's own precision."""
        raise NotImplementedError


class LoRALinear(Adapter):
    """A linear layer (weight [O, I], optional bias), frozen, and its trained correction.

    A base in few bits (`dense` gives its weight) stays so: its weight is made for each product.

    group: so many neighbouring inputs share a column of A, so A is [r, I / group]. rslora: the
    correction counts alpha / √r, which keeps its size whatever the rank is. Kalajdzievski, "rsLoRA",
    2023 (arXiv:2312.03732).
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        group: int = 1,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        layer: Any = base
        weight: Tensor | None = getattr(base, "weight", None)
        held = next(itertools.chain(base.parameters(), base.buffers()))
        outputs, inputs = (layer.outputs, layer.inputs) if weight is None else weight.shape
        self.outputs, self.inputs = outputs, inputs
        assert inputs % group == 0, f"{inputs} inputs do not make groups of {group}"
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout, self.group = dropout, group
        computed = layer.dtype if weight is None else weight.dtype
        exact = torch.promote_types(computed, torch.float32)
        self.A = nn.Parameter(torch.zeros(rank, inputs // group, dtype=exact, device=held.device))
        self.B = nn.Parameter(torch.zeros(outputs, rank, dtype=exact, device=held.device))

    def start(self, seed: int, name: str) -> None:
        """A uniform in ±1/√I (as nn.Linear starts), B zero; decided by the seed and the name."""
        digest = hashlib.sha256(f"lora/{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1 / math.sqrt(self.A.shape[1] * self.group)
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
            self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O]"""
        base = self.base
        if self.bypassed:
            untuned: Tensor = base(x)
            return untuned
        if self.training and self.dropout:
            return self.plain(x)
        rows = x.reshape(-1, x.shape[-1])
        y = low_rank(rows, (base,), (self.A,), (self.B,), self.scale, self.group)
        return y.view(*x.shape[:-1], -1)

    def plain(self, x: Tensor) -> Tensor:
        """The twin, and the path with dropout (on the correction's input only)."""
        dropped = F.dropout(x, self.dropout, self.training)
        down = F.linear(dropped, self.wide_A().to(x.dtype))
        y: Tensor = self.base(x) + self.scale * F.linear(down, self.B.to(x.dtype))
        return y

    def wide_A(self) -> Tensor:
        """A with a column for every input, [r, I]: what other libraries call A."""
        return self.A.repeat_interleave(self.group, 1) if self.group > 1 else self.A

    def correction(self) -> Tensor:
        """scale · B A, float32 [O, I]."""
        return self.scale * (self.B.float() @ self.wide_A().float())

    def merged(self) -> Tensor:
        """The matrix that both together are, float32 [O, I]."""
        weight = self.base.weight
        assert isinstance(weight, Tensor), "only a dense matrix takes a correction"
        return weight.float() + self.correction()

    @torch.no_grad()
    def merge(self) -> nn.Module:
        weight = self.base.weight
        assert isinstance(weight, Tensor), "only a dense matrix takes a correction"
        weight.copy_(self.merged().to(weight.dtype))
        return self.base


def together(x: Tensor, *layers: nn.Module) -> Tensor | None:
    """What these layers give of the same x [..., I], end to end [..., ΣO], if they are adapters that one
    product can be; else None."""
    # a layer whose product goes by another way (tensor parallel) is not taken into one
    if not all(type(one) is LoRALinear and "forward" not in vars(one) for one in layers):
        return None
    adapters: list[Any] = list(layers)
    first = adapters[0]
    for one in adapters:
        alike = (one.scale, one.group) == (first.scale, first.group)
        alike &= (one.base.bias is None) == (first.base.bias is None)
        if not alike or one.bypassed != first.bypassed or (one.training and one.dropout):
            return None
    bases, As, Bs = zip(*((one.base, one.A, one.B) for one in adapters), strict=True)
    rows = x.reshape(-1, x.shape[-1])
    if first.bypassed:  # the very product that a correction is added to
        y = product(rows, bases)
    else:
        y = low_rank(rows, bases, As, Bs, first.scale, first.group)
    return y.view(*x.shape[:-1], -1)


def apply_lora(
    decoder: nn.Module,
    *,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    group: int = 1,
    rslora: bool = False,
    kind: type[LoRALinear] = LoRALinear,
    last_layers: int = 0,
    seed: int = 0,
) -> dict[str, LoRALinear]:
    """Freeze the decoder and put adapters on `targets` (of q k v o gate up down); name → adapter.

    last_layers: only that many of the last blocks (0: all). Nothing below the first adapter needs a
    gradient, so autograd keeps nothing for those blocks: they cost a forward pass and no memory.
    """
    decoder.requires_grad_(False)
    adapters: dict[str, LoRALinear] = {}
    for name in matrices(decoder, targets, last_layers):
        adapters[name] = put_adapter(decoder, name, rank, alpha, dropout, group, rslora, kind)
        adapters[name].start(seed, name)
    streamed = getattr(decoder, "streamed", None)  # it lays them so itself
    for name, first in adapters.items():
        room, _, leaf = name.rpartition(".")
        others = (adapters.get(f"{room}.{other}") for other in BESIDE.get(leaf, ()))
        bases = [one.base for one in (first, *others) if one is not None]
        there = all(hasattr(base, "weight") for base in bases) and not streamed
        if len(bases) > 1 and there:
            side_by_side(bases)
    return adapters


def matrices(decoder: nn.Module, targets: Iterable[str], last_layers: int = 0) -> list[str]:
    """The names of all these matrices, in that many of the last blocks (0: all)."""
    blocks = decoder.blocks
    assert isinstance(blocks, nn.ModuleList)
    first = max(0, len(blocks) - last_layers) if last_layers else 0
    wanted = [target for target in TARGETS if target in set(targets)]
    return [
        f"blocks.{number}.{place}"
        for number in range(first, len(blocks))
        for target in wanted
        for place in places(blocks[number], target)
    ]


def places(block: nn.Module, target: str) -> list[str]:
    """Where a block has this matrix: an MLP without a gate has none, a mixture one in each expert, a
    decoder that looks at an encoder one more in its cross-attention."""
    room, _, leaf = TARGETS[target].rpartition(".")
    rooms = "attention|cross" if room == "attention" else rf"{room}(\.experts\.\d+)?"
    found = re.compile(rf"({rooms})\.{leaf}")
    return [name for name, _ in block.named_modules() if found.fullmatch(name)]


def put_adapter(
    decoder: nn.Module,
    name: str,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    group: int = 1,
    rslora: bool = False,
    kind: type[LoRALinear] = LoRALinear,
) -> LoRALinear:
    """Replace the linear layer of that name by itself with an adapter (untrained, all zero)."""
    layer = decoder.get_submodule(name)
    adapter = kind(layer, rank, alpha, dropout, group, rslora)
    replace(decoder, name, adapter)
    return adapter


def replace(decoder: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another layer where the one of that name is."""
    parent, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(parent), leaf, layer)


def adapters_of(decoder: nn.Module) -> dict[str, Adapter]:
    """The adapters that a decoder carries, of every kind, by name."""
    return {name: m for name, m in decoder.named_modules() if isinstance(m, Adapter)}


@contextmanager
def bypass(decoder: nn.Module) -> Iterator[None]:
    """Inside, the decoder is the base that it was before it got adapters."""
    adapters = adapters_of(decoder).values()
    for adapter in adapters:
        adapter.bypassed = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.bypassed = False


def merge_lora(decoder: nn.Module) -> None:
    """Fold every adapter, of every kind, into its base, in float32, and take it off."""
    for name, adapter in adapters_of(decoder).items():
        replace(decoder, name, adapter.merge())
