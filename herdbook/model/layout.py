"""Where keys and values live: what the decoder asks for attention.

T tokens on one flat axis, H query heads, KV key/value heads, D head_dim.

The decoder knows nothing of documents, batches or caches: it hands q, k and v of its T tokens to the
layout. `Packed` lays whole documents end to end (training, scoring); the engine's layout keeps keys
and values in pages. The same decoder code runs in both, which is why what is served is what was
trained.

A prefix model (herdbook/model/prefix.py) finds its contexts in the tokens, so the decoder shows them to
the layout before it asks for positions: whoever lays out documents need not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from herdbook.model.attention import Look, attend
from herdbook.model.causal import causal
from herdbook.model.config import DecoderConfig
from herdbook.model.fused import learns
from herdbook.model.prefix import find_context
from herdbook.model.soft import Prefix, ProjectedPrefix, Prompt, Soft


class Layout(Protocol):
    positions: Tensor  # int64 [T], each token's place in its own document; [T, 2] with rope2d

    def find_contexts(self, ids: Tensor, config: DecoderConfig) -> None:
        """ids [T]: called first, for prefix models alone."""
        ...

    def begin(self, x: Tensor, soft: Soft | None, *, shift: bool) -> Tensor:
        """x [T, width], the tokens' rows of the embedding: called behind find_contexts, with what
        stands before every document. shift: it takes places. → what the decoder goes on with."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        """q [T, H, D], k and v [T, KV, D] (rotated) → [T, H, D]."""
        ...

    def end(self, x: Tensor) -> Tensor:
        """What the last block gives → [T, hidden], of the tokens that were asked for."""
        ...


@dataclass(frozen=True)
class _Group:
    """Documents of one length (and one context), attended in one batched call."""

    length: int
    context: int  # tokens that see each other whole
    count: int
    rows: Tensor | slice  # their tokens on the flat axis, document after document


class Packed:
    """Whole documents end to end: causal inside each, none sees another. Differentiable, no padding.

    >>> Packed([3, 2]).positions
    tensor([0, 1, 2, 0, 1])

    Documents of equal length share one call of the attention kernel; each call does only its own
    L² work, so a pack of many short documents costs what they cost singly.

    Virtual tokens stand before every document, and once in a pack: of a trained prefix each document
    sees the keys and values, and those of a trained prompt, which depend on nothing behind it, are
    computed once, as rows of their own before all documents.
    """

    soft: Soft | None = None

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        assert lengths and min(lengths) > 0, "a document has at least one token"
        self.lengths = tuple(lengths)
        self.notes: dict[str, Any] = {}  # what a model finds out about these documents at its start
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        self._arrange([0] * len(lengths))

    def _arrange(self, contexts: Sequence[int]) -> None:
        """Group the documents; contexts: the tokens of each that see each other whole."""
        device = self.positions.device
        starts: dict[tuple[int, int], list[int]] = {}
        at = 0
        for n, context in zip(self.lengths, contexts, strict=True):
            starts.setdefault((n, context if context > 1 else 0), []).append(at)
            at += n
        self.groups: list[_Group] = []
        for (n, context), firsts in starts.items():
            if firsts == list(range(firsts[0], firsts[0] + n * len(firsts), n)):  # side by side
                rows: Tensor | slice = slice(firsts[0], firsts[0] + n * len(firsts))
            else:
                first = torch.tensor(firsts, device=device)
                rows = (first[:, None] + torch.arange(n, device=device)).flatten()
            self.groups.append(_Group(n, context, len(firsts), rows))
        taken = [first for firsts in starts.values() for first in firsts]
        # where each token's result lies once the groups' results are put end to end
        self.back = None
        if taken != sorted(taken):
            order = torch.arange(at, device=device)
            self.back = torch.argsort(torch.cat([order[g.rows] for g in self.groups]))
        self._masks: dict[tuple[int, int, Look, int], Tensor] = {}

    def find_contexts(self, ids: Tensor, config: DecoderConfig) -> None:
        documents = torch.split(ids, list(self.lengths))
        found = [find_context(one.tolist(), config) for one in documents]
        device = self.positions.device
        places = (one.places(0, n, device) for one, n in zip(found, self.lengths, strict=True))
        self.positions = torch.cat(list(places))
        self._arrange([one.tokens for one in found])

    def begin(self, x: Tensor, soft: Soft | None, *, shift: bool) -> Tensor:
        self.soft = soft
        if soft is not None and shift:
            self.positions = self.positions + soft.tokens
        if not isinstance(soft, Prompt):
            return x
        self.positions = torch.cat([torch.arange(soft.tokens, device=x.device), self.positions])
        return torch.cat([soft.rows.to(x.dtype), x])

    def end(self, x: Tensor) -> Tensor:
        return x[self.soft.tokens :] if isinstance(self.soft, Prompt) else x

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        if isinstance(self.soft, Prefix | ProjectedPrefix):
            return self._attend(q, k, v, look, *self.soft.before(layer, k.dtype))
        if isinstance(self.soft, Prompt):
            n = self.soft.tokens
            prompt = Packed([n], q.device)._attend(q[:n], k[:n], v[:n], look)
            return torch.cat([prompt, self._attend(q[n:], k[n:], v[n:], look, k[:n], v[:n])])
        return self._attend(q, k, v, look)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, look: Look, *before: Tensor) -> Tensor:
        """before: keys and values [n, KV, D] that each document sees in front of its own."""
        parts = []
        n = len(before[0]) if before else 0
        if learns(q) and not before and self._plain(look, q):
            return causal(q, k, v, look.scale, [(g.length, g.count, g.rows) for g in self.groups])
        for g in self.groups:
            # [n·L, heads, D] → [n, heads, L, D]
            qg, kg, vg = (
                t[g.rows].view(g.count, g.length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)
            )
            mask = None
            windowed = look.window is not None and look.window < g.length
            if look.slopes or windowed or g.context or n:
                mask = self._mask(g.length, g.context, look, q, n)
            if before:
                front = (one.transpose(0, 1).expand(g.count, -1, -1, -1) for one in before)
                kg, vg = (torch.cat(two, 2) for two in zip(front, (kg, vg), strict=True))
            out = attend(qg, kg, vg, look, mask, causal=mask is None)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        if self.back is None:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.cat(parts)[self.back]

    def _plain(self, look: Look, q: Tensor) -> bool:
        """Whether a token sees all of its document up to itself, by its score alone, on a CPU."""
        windowed = look.window is not None and look.window < max(self.lengths)
        contexts = any(g.context for g in self.groups)
        here = q.device.type in ("cpu", "meta")  # which a plan lays out in its stead
        return here and not (look.softcap or look.slopes or windowed or contexts)

    def _mask(self, length: int, context: int, look: Look, q: Tensor, n: int) -> Tensor:
        """What the row's token sees of the column's, the first n of which are virtual: bool [L, n + L],
        or with ALiBi [H, L, n + L] to add."""
        if (length, context, look, n) not in self._masks:
            keys = torch.arange(n + length, device=q.device)
            queries = keys[n:]
            back = queries[:, None] - keys
            mask = (back >= 0) | (keys < n + context)
            if look.window is not None:
                mask &= back < look.window
            if look.slopes:
                mask = look.bias(queries, keys, q.dtype).masked_fill(~mask, float("-inf"))
            self._masks[length, context, look, n] = mask
        return self._masks[length, context, look, n]


class Masked:
    """The plain twin of Packed: one [T, T] mask over everything, softmax written out."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.positions = torch.cat([torch.arange(n) for n in lengths])
        self.context = torch.zeros(len(self.positions), dtype=torch.bool)
        self.document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])

    def find_contexts(self, ids: Tensor, config: DecoderConfig) -> None:
        places = []
        for i, n in enumerate(self.lengths):
            found = find_context(ids[self.document == i].tolist(), config)
            self.context[self.document == i] = torch.arange(n) < found.tokens
            places.append(found.places(0, n))
        self.positions = torch.cat(places)

    def begin(self, x: Tensor, soft: Soft | None, *, shift: bool) -> Tensor:
        assert soft is None, "the twin knows no virtual tokens"
        return x

    def end(self, x: Tensor) -> Tensor:
        return x

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        at = torch.arange(len(q))
        back = at[:, None] - at
        sees = ((back >= 0) | self.context) & (self.document[:, None] == self.document)
        if look.window is not None:
            sees &= back < look.window
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * look.scale
        if look.softcap:
            scores = look.softcap * torch.tanh(scores / look.softcap)
        if look.slopes:
            scores = scores - torch.tensor(look.slopes)[:, None, None] * back
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)
