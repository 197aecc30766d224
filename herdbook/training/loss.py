"""Next-token loss whose logits are never whole, and whose head runs only where the loss is.

Shapes: T tokens of a pack · N of them with a loss · H hidden · V vocabulary · C rows of a chunk

A pack of 1,024 tokens over SmolLM2's 49,152 tokens would make 200 MB of logits, and as much again
for each of softmax and gradient. Instructions are not trained on, so usually half of these rows
are never looked at. `linear_cross_entropy` picks the N rows that count, takes them C at a time,
and has their gradient ready before the chunk's logits [C, V] are thrown away: the gradient of a
sum of cross-entropies needs nothing from above but one factor.

The idea of computing the gradient in the forward pass: Hsu et al., "Liger Kernel", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: a target that has no loss
IGNORE = -1
#: bytes of logits that are alive at once: so many rows that the head's product is worth reading the head
CHUNK_BYTES = 48 * 2**20
#: bytes of them that are float32 for the moment (on a CPU), and stay in the cache
STRIP_BYTES = 2**20


def next_tokens(ids: Sequence[int], mask: Sequence[bool], lengths: Sequence[int]) -> Tensor:
    """What each token of a pack has to predict: int64 [T], IGNORE where nothing.

    Position t predicts token t + 1 where that one is trained (mask) and of the same document: a
    document's last token predicts nothing, and its first is nobody's target.

    >>> next_tokens([5, 6, 7, 8, 9], [True] * 5, [3, 2]).tolist()
    [6, 7, -1, 9, -1]
    """
    assert len(ids) == len(mask) == sum(lengths), (len(ids), len(mask), sum(lengths))
    targets = torch.full((len(ids),), IGNORE, dtype=torch.int64)
    if len(ids) < 2:
        return targets
    trained = torch.tensor(mask, dtype=torch.bool)
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)[:-1]
    trained[ends[ends < len(ids)]] = False  # the first token of each further document
    targets[:-1] = torch.where(trained[1:], torch.tensor(ids, dtype=torch.int64)[1:], IGNORE)
    return targets


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over the N rows with a target of −log softmax(hidden · weightᵀ)[target], a scalar.

    hidden [T, H], weight [V, H], targets int64 [T]. Gradients: of hidden, and of weight where it
    needs one (full tuning; a tied head adds it to the embedding's).
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


def plain_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The twin: the same number in one line, with all of the logits."""
    logits = F.linear(hidden, weight)
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        rows = (targets != IGNORE).nonzero().squeeze(1)  # [N]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        for some in torch.split(rows, max(16, CHUNK_BYTES // (weight.shape[0] * weight.itemsize))):
            states, wanted = hidden[some], targets[some, None]  # [C, H], [C, 1]
            logits = F.linear(states, weight)  # [C, V]; the gradient takes its place
            strip = max(1, STRIP_BYTES // (weight.shape[0] * exact.itemsize))
            strip = strip if weight.device.type == "cpu" else len(some) or 1
            for part, right in zip(logits.split(strip), wanted.split(strip), strict=True):  # type: ignore[no-untyped-call]
                wide = part.to(exact)
                peak = wide.amax(1, keepdim=True)
                met = wide.gather(1, right)
                chances = wide.sub_(peak).exp_()
                mass = chances.sum(1, keepdim=True)
                total += (mass.log() + peak - met).sum(dtype=torch.float64)
                grad = chances.div_(mass)  # ∂loss/∂logits = softmax − one-hot
                part.copy_(grad.scatter_add_(1, right, grad.new_full(right.shape, -1.0)))
            if grad_weight is not None:
                grad_weight += logits.T @ states
            if grad_hidden is not None:
                grad_hidden[some] = logits @ weight
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (above,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * above.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * above).to(ctx.weight_dtype),
            None,
        )


def linear_divergence(hidden: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    """Sum over all rows of KL(base ‖ tuned), a scalar: how far the tuned model has moved.

    hidden [T, H] with a gradient, base [T, H] without, both before the head weight [V, H], which is
    frozen. Zero, with a zero gradient, where both agree; so rows to keep pull back only what drifts.
    """
    loss: Tensor = _LinearDivergence.apply(hidden, base, weight)  # type: ignore[no-untyped-call]
    return loss


def plain_linear_divergence(hidden: Tensor, base: Tensor, weight: Tensor) -> Tensor:
    """The twin, with all of the logits."""
    tuned, kept = F.linear(hidden, weight).log_softmax(-1), F.linear(base, weight).log_softmax(-1)
    return F.kl_div(tuned, kept, reduction="sum", log_target=True)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, base: Tensor, weight: Tensor) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        size = max(16, CHUNK_BYTES // (2 * weight.shape[0] * exact.itemsize))
        for start in range(0, len(hidden), size):
            some = slice(start, start + size)
            tuned = F.linear(hidden[some], weight).to(exact).log_softmax(-1)  # [C, V]
            kept = F.linear(base[some], weight).to(exact).log_softmax(-1)
            chances = kept.exp()
            total += (chances * kept.sub_(tuned)).sum(dtype=torch.float64)
            grad = tuned.exp_().sub_(chances)  # ∂loss/∂logits = softmax(tuned) − softmax(base)
            grad_hidden[some] = grad.to(weight.dtype) @ weight
        ctx.save_for_backward(grad_hidden)
        return total.to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (above,), (grad_hidden,) = grads, ctx.saved_tensors
        return grad_hidden * above.to(grad_hidden.dtype), None, None
