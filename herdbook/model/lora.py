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

Autograd would not need the frozen W's gradient either, but makes a [T, O] product of its own for
the correction; `_LoRA` adds the correction into the base's output and saves only x (which q, k and
v share; its sums over groups [T, I/g] are smaller still) and x Aᵀ [T, r]. `LoRALinear.plain` is
its twin.
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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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
        y = low_rank(rows, base, base.bias, self.A, self.B, self.scale, self.group)
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


def pooled(x: Tensor, group: int) -> Tensor:
    """x [T, I] summed over groups of neighbours: [T, I / group]."""
    return x if group == 1 else x.unflatten(1, (-1, group)).sum(-1)  # type: ignore[no-untyped-call]


def low_rank(x: Tensor, base: Any, bias: Any, A: Tensor, B: Tensor, *how: float) -> Tensor:
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ for rows x [T, I] → [T, O], W that of `base`; how: the scale, and
    the group."""
    y: Tensor = _LoRA.apply(x, base, bias, A, B, *how)  # type: ignore[no-untyped-call]
    return y


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """The frozen matrix [O, I]; of a base in few bits in memory of its own."""
    weight: Tensor | None = getattr(base, "weight", None)
    found: Tensor = base.dense(dtype) if weight is None else weight
    return found


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Any,
        bias: Any,
        A: Tensor,
        B: Tensor,
        scale: float,
        group: int,
    ) -> Tensor:
        A, B = A.to(x.dtype), B.to(x.dtype)
        seen = pooled(x, group)
        down = seen @ A.T  # [T, r]
        y = F.linear(x, _weight(base, x.dtype), bias)
        y.addmm_(down, B.T, alpha=scale)
        ctx.save_for_backward(seen, down, A, B)
        ctx.base, ctx.scale, ctx.group = base, scale, group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (above,) = grads  # [T, O]
        seen, down, A, B = ctx.saved_tensors
        grad_down = (above @ B).mul_(ctx.scale)  # [T, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = above @ _weight(ctx.base, above.dtype)
            if ctx.group == 1:
                grad_x.addmm_(grad_down, A)
            else:
                groups = grad_x.view(len(grad_x), -1, ctx.group)
                groups.add_((grad_down @ A)[..., None])
        grad_A = grad_down.T @ seen
        grad_B = (down.T @ above).mul_(ctx.scale).T  # [O, r]; down.T @ above reads `above` in order
        return grad_x, None, None, grad_A, grad_B, None, None


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
