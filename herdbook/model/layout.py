"""Where keys and values live: what the decoder asks for attention.

T tokens on one flat axis, H query heads, KV key/value heads, D head_dim.

The decoder knows nothing of documents, batches or caches: it hands q, k and v of its T tokens to the
layout. `Packed` lays whole documents end to end (training, scoring); the engine's layout keeps keys
and values in pages. The same decoder code runs in both, which is why what is served is what was
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Layout(Protocol):
    positions: Tensor  # int64 [T], each token's place in its own document

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        """q [T, H, D], k and v [T, KV, D] (rotated) → [T, H, D].

        window: a token sees itself and the window − 1 tokens before it; None: all before it.
        """
        ...


@dataclass(frozen=True)
class _Group:
    """Documents of one length, attended in one batched call."""

    length: int
    count: int
    rows: Tensor | slice  # their tokens on the flat axis, document after document


class Packed:
    """Whole documents end to end: causal inside each, none sees another. Differentiable, no padding.

    >>> Packed([3, 2]).positions
    tensor([0, 1, 2, 0, 1])

    Documents of equal length share one call of the attention kernel; each call does only its own
    L² work, so a pack of many short documents costs what they cost singly.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        assert lengths and min(lengths) > 0, "a document has at least one token"
        self.lengths = tuple(lengths)
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        starts: dict[int, list[int]] = {}
        at = 0
        for n in lengths:
            starts.setdefault(n, []).append(at)
            at += n
        self.groups: list[_Group] = []
        for n, firsts in starts.items():
            if firsts == list(range(firsts[0], firsts[0] + n * len(firsts), n)):  # side by side
                rows: Tensor | slice = slice(firsts[0], firsts[0] + n * len(firsts))
            else:
                first = torch.tensor(firsts, device=device)
                rows = (first[:, None] + torch.arange(n, device=device)).flatten()
            self.groups.append(_Group(n, len(firsts), rows))
        order = torch.arange(at, device=device)
        taken = torch.cat([order[g.rows] for g in self.groups])
        # where each token's result lies once the groups' results are put end to end
        self.back = None if torch.equal(taken, order) else torch.argsort(taken)
        self._masks: dict[tuple[int, int], Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        parts = []
        for g in self.groups:
            # [n·L, heads, D] → [n, heads, L, D]
            qg, kg, vg = (
                t[g.rows].view(g.count, g.length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)
            )
            mask = None
            if window is not None and window < g.length:
                mask = self._mask(g.length, window, q.device)
            out = F.scaled_dot_product_attention(
                qg,
                kg,
                vg,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            parts.append(out.transpose(1, 2).flatten(0, 1))
        if self.back is None:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.cat(parts)[self.back]

    def _mask(self, length: int, window: int, device: torch.device) -> Tensor:
        """bool [L, L]: True where the row's token sees the column's."""
        if (length, window) not in self._masks:
            at = torch.arange(length, device=device)
            back = at[:, None] - at
            self._masks[length, window] = (back >= 0) & (back < window)
        return self._masks[length, window]


class Masked:
    """The plain twin of Packed: one [T, T] mask over everything, softmax written out."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.positions = torch.cat([torch.arange(n) for n in lengths])
        self.document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        at = torch.arange(len(q))
        back = at[:, None] - at
        sees = (back >= 0) & (self.document[:, None] == self.document)
        if window is not None:
            sees &= back < window
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)
