"""The difference of two tensors, and what must be kept beside it so that it gives the target back.

Exact in every type: the difference d of a target t and a base b, and their sum, are computed in
float32 (float64 where one of the two is), each rounded once to the target's type. b + d is then t
again where |d| is not much greater than |t|, which is most of a tuned model; wherever its bits differ
(a sign that turned, −0, an overflow, NaN), position and value are kept beside the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: values computed at a time
STRIP = 1 << 20
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}


class Difference(NamedTuple):
    """target − base, and the values that adding it to the base does not give back."""

    delta: Tensor
    at: Tensor  # positions in the flat tensor
    value: Tensor


def difference(target: Tensor, base: Tensor) -> Difference:
    """Both of the same shape; the result has the target's type.

    >>> difference(torch.tensor([1.5, -0.0]), torch.tensor([1.25, 3.0]))
    Difference(delta=tensor([ 0.2500, -3.0000]), at=tensor([1]), value=tensor([-0.]))
    """
    t, b, delta = target.view(-1), base.view(-1), torch.empty_like(target)
    wide = _wide(t, b)
    found = [torch.empty(0, dtype=torch.int64)]
    for strip in _strips(t):
        d = (t[strip].to(wide) - b[strip].to(wide)).to(t.dtype)
        again = (b[strip].to(wide) + d.to(wide)).to(t.dtype)
        found.append((_bits(again) != _bits(t[strip])).nonzero().view(-1) + strip.start)
        delta.view(-1)[strip] = d
    at = torch.cat(found)
    return Difference(delta, at.int() if t.numel() < 2**31 else at, t[at])


def restore(change: Difference, base: Tensor) -> Tensor:
    """The target again. The difference's own memory is used."""
    target, b = change.delta.view(-1), base.view(-1)
    wide = _wide(target, b)
    for strip in _strips(target):
        target[strip] = (b[strip].to(wide) + target[strip].to(wide)).to(target.dtype)
    target[change.at.long()] = change.value
    return change.delta


def _strips(flat: Tensor) -> Iterator[slice]:
    for first in range(0, flat.numel(), STRIP):
        yield slice(first, min(first + STRIP, flat.numel()))


def _wide(one: Tensor, other: Tensor) -> torch.dtype:
    """The type that both are computed in."""
    return torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32


def _bits(values: Tensor) -> Tensor:
    return values.view(BITS[values.element_size()])
