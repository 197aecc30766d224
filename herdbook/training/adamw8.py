"""AdamW whose moments take 8 bits each: 2.03 bytes a weight beside it and not 8.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021 (arXiv:2110.02861), with blocks of
256 (model/blockwise.py): read, moved in float32 with the new gradient, used, and rounded again.

Of the second moment the root is kept. Under the paper's own levels a second moment below 1.6e-7 of
its block's largest falls to zero, so a gradient of a 2,500th of the largest; the first moment has it
still, and divided by nothing it makes a step of any size. Roots span as far as the gradients do, and
what is still lost is so small that epsilon bounds the step.

Weights of fewer than 4,096 numbers (norms, biases) keep float32 moments: they cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from herdbook.model import blockwise

SMALL = 4096
#: weights that are moved at once, whole blocks: what is float32 for the moment stays in the cache
STRIP = 1 << 16


class AdamW8(torch.optim.Optimizer):
    """State of a weight: `step`; codes uint8 and scales float32 of `first` and `root`."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in (one for one in group["params"] if one.grad is not None):
                state = self.state[weight]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for name in ("first", "root"):
                        state |= _nothing(name, weight)
                state["step"] += 1
                self._move(weight, state, group)

    def _move(self, weight: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        (decay1, decay2), count = group["betas"], float(state["step"])
        flat, grads = weight.view(-1), weight.grad.flatten()  # type: ignore[union-attr]
        for at in range(0, len(flat), STRIP):
            some = slice(at, at + STRIP)
            grad = grads[some]
            first, root = _read(state, "first", some), _read(state, "root", some)
            first.lerp_(grad, 1 - decay1)
            root.square_().mul_(decay2).addcmul_(grad, grad, value=1 - decay2).sqrt_()
            _write(state, "first", some, first)
            _write(state, "root", some, root)
            below = root.div_((1 - decay2**count) ** 0.5).add_(group["eps"])
            flat[some].mul_(1 - group["lr"] * group["weight_decay"])
            flat[some].addcdiv_(first, below, value=-group["lr"] / (1 - decay1**count))


def _nothing(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The state of a moment that is zero."""
    size, where = weight.numel(), weight.device
    if size < SMALL:
        return {name: torch.zeros(size, device=where)}
    (zero,), _ = blockwise.encode(torch.zeros(1), signed=name == "first")
    return {
        name: torch.full((size,), int(zero), dtype=torch.uint8, device=where),
        f"{name}_scale": torch.zeros(-(-size // blockwise.BLOCK), device=where),
    }


def _blocks(some: slice) -> slice:
    return slice(some.start // blockwise.BLOCK, some.stop // blockwise.BLOCK)


def _read(state: dict[str, Tensor], name: str, some: slice) -> Tensor:
    codes = state[name][some]
    if codes.dtype == torch.float32:
        return codes.clone()
    return blockwise.decode(codes, state[f"{name}_scale"][_blocks(some)], signed=name == "first")


def _write(state: dict[str, Tensor], name: str, some: slice, moment: Tensor) -> None:
    codes = state[name][some]
    if codes.dtype == torch.float32:
        codes.copy_(moment)
        return
    new, scale = blockwise.encode(moment, signed=name == "first")
    codes.copy_(new)
    state[f"{name}_scale"][_blocks(some)] = scale
