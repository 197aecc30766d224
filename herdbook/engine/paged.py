"""The layout of the engine in PyTorch: keys and values live in pages, each sequence sees its own.

On a GPU with Triton `tiled.Tiled` does the same in one kernel; this is its twin.

Shapes: T tokens of the whole batch, n tokens of one sequence in this step, S tokens it has then
(n included), H heads, KV key/value heads, D size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many

import torch
from torch import Tensor
from torch.nn.functional import pad

from herdbook.engine.cache import Cache
from herdbook.engine.placed import Placed, positions_of, slots_of, virtual_of
from herdbook.engine.sequence import Sequence
from herdbook.model.attention import Look, attend

#: what numbers of queries and keys are multiples of (_padded)
SHAPES = 16


class _Span:
    """The part of one sequence in this step: rows `first` to `first + n` of the batch."""

    def __init__(
        self, sequence: Sequence, first: int, page_tokens: int, device: torch.device
    ) -> None:
        self.first, self.n = first, sequence.scheduled
        self.start = sequence.computed
        self.end = self.start + self.n
        self.context = sequence.context.tokens if sequence.context else 0
        self._page_tokens, self._device = page_tokens, device
        self.pages = sequence.pages[: -(-self.end // page_tokens)]
        self._reads: dict[int | None, tuple[Tensor | slice, int, int]] = {}
        self._masks: dict[tuple[Look, torch.dtype], Tensor | None] = {}

    @property
    def begun(self) -> int | None:
        """The page that this step begins and does not fill."""
        place = self.end % self._page_tokens
        return self.pages[-1] if place and self.end - place >= self.start else None

    def reach(self, window: int | None) -> tuple[Tensor | slice, int, int]:
        """What the span looks at: its pages, and from where to where in them. Once per window."""
        if window not in self._reads:
            # With a window of w a token sees itself and the w - 1 before it.
            oldest = 0 if window is None else max(0, self.start - window + 1)
            skipped = oldest // self._page_tokens
            pages = self.pages[skipped:]
            shift = skipped * self._page_tokens
            together = pages == list(range(pages[0], pages[0] + len(pages)))
            where = (
                slice(pages[0], pages[0] + len(pages))
                if together
                else torch.tensor(pages, device=self._device)
            )
            self._reads[window] = where, oldest - shift, self.end - shift
        return self._reads[window]

    def mask(self, look: Look, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of [n, seen] ([H, n, seen] with ALiBi): -inf where a token must
        not look; None where one token sees all."""
        if self.n == 1 and not look.slopes:
            return None
        if (look, dtype) not in self._masks:
            window = look.window
            oldest = 0 if window is None else max(0, self.start - window + 1)
            queries = torch.arange(self.start, self.end, device=self._device)
            keys = torch.arange(oldest, self.end, device=self._device)
            hidden = (keys > queries[:, None]) & (keys >= self.context)
            if window is not None:
                hidden |= keys <= queries[:, None] - window
            mask = (
                look.bias(queries, keys, dtype)
                if look.slopes
                else torch.zeros(hidden.shape, dtype=dtype, device=self._device)
            )
            self._masks[look, dtype] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[look, dtype]


class _Decoding:
    """All the sequences of a step that compute one token after others: attended in one call.

    Their pages are padded, each's with its last one, to the most that one of them has; what is
    padding is masked. The query heads that share a head of keys stand where the kernel expects a sequence of queries.
    """

    def __init__(self, spans: Many[_Span], page_tokens: int, device: torch.device) -> None:
        self.rows = torch.tensor([span.first for span in spans], device=device)
        most = max(len(span.pages) for span in spans)
        padded = [span.pages + span.pages[-1:] * (most - len(span.pages)) for span in spans]
        self.pages = torch.tensor(padded, device=device)  # [B, P]
        self._ends = torch.tensor([span.end for span in spans], device=device)[:, None]
        self._places = torch.arange(most * page_tokens, device=device)
        self._masks: dict[tuple[Look, int, torch.dtype], Tensor] = {}

    def mask(self, look: Look, kv_heads: int, dtype: torch.dtype) -> Tensor:
        """[B, 1, 1, P · page_tokens], -inf where a sequence's token must not look.

        With ALiBi [B, KV, H / KV, P · page_tokens], as the queries stand.
        """
        if (look, kv_heads, dtype) not in self._masks:
            hidden = self._places >= self._ends
            if look.window is not None:
                hidden |= self._places < self._ends - look.window
            hidden = hidden[:, None, None]
            if look.slopes:
                bias = look.bias(self._ends - 1, self._places, dtype)  # [B, H, 1, S]
                mask = bias.view(len(bias), kv_heads, -1, bias.shape[-1])
            else:
                mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._masks[look, kv_heads, dtype] = mask.masked_fill(hidden, float("-inf"))
        return self._masks[look, kv_heads, dtype]


class Paged(Placed):
    """The layout of the engine in PyTorch, sequence by sequence."""

    def __init__(self, cache: Cache, batch: Many[Sequence], device: torch.device) -> None:
        slots = torch.tensor(slots_of(batch, cache.page_tokens), device=device)
        super().__init__(cache, positions_of(batch, device), slots, virtual_of(batch))
        self._spans: list[_Span] = []
        first = 0
        for one in batch:
            self._spans.append(_Span(one, first, cache.page_tokens, device))
            first += one.scheduled
        begun = [span.begun for span in self._spans if span.begun is not None]
        self._begun = torch.tensor(begun, device=device) if begun else None
        decoding = [span for span in self._spans if span.n == 1 and span.start]
        self._decoding = None
        if len(decoding) > 1:
            self._decoding = _Decoding(decoding, cache.page_tokens, device)
            self._spans = [span for span in self._spans if span.n > 1 or not span.start]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        if self._begun is not None:
            self._cache.start(layer, self._begun)
        return super().attend(layer, q, k, v, look)

    def _look(self, layer: int, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        window = look.window
        result = torch.empty_like(q)
        if self._decoding is not None:
            both = self._cache.read(layer, self._decoding.pages, q.dtype)
            keys, values = (one.flatten(1, 2).transpose(1, 2) for one in both)
            # queries [B, KV, H / KV, D]: the heads that share keys, as a sequence
            out = attend(
                q[self._decoding.rows].view(-1, k.shape[1], q.shape[1] // k.shape[1], q.shape[2]),
                keys,
                values,
                look,
                self._decoding.mask(look, k.shape[1], q.dtype),
            )
            result[self._decoding.rows] = out.flatten(1, 2)
        for span in self._spans:
            rows = slice(span.first, span.first + span.n)
            whole = span.start == 0 and (window is None or span.n <= window)
            if whole:  # the beginning of a prompt: all it sees is at hand
                mine = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
            else:
                pages, start, end = span.reach(window)
                both = self._cache.read(layer, pages, q.dtype)
                keys, values = (one.flatten(0, 1)[start:end].transpose(0, 1) for one in both)
                mine = keys, values
            plain = whole and not look.slopes and span.context < 2
            mask = None if plain else span.mask(look, q.dtype)
            asked = q[rows].transpose(0, 1)
            if span.n > 1 and q.dtype.itemsize == 2 and q.device.type == "cpu":
                asked, mine, mask = _padded(asked, mine, mask)
            out = attend(
                asked[None],
                mine[0][None],
                mine[1][None],
                look,
                mask,
                causal=plain and span.n > 1,
            )
            result[rows] = out[0, :, : span.n].transpose(0, 1)
        return result


def _padded(
    q: Tensor, both: tuple[Tensor, Tensor], mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """q [H, n, D], keys and values [KV, S, D] and mask [(H,) n, S] with n and S rounded up to multiples
    of SHAPES: torch compiles its attention for each n and S in 16 bits, and keeps that for ever (85 kB).
    The first n queries see what they saw: without a mask by causality, since then n is S.
    """
    n, seen = q.shape[1], both[0].shape[1]
    behind = 0, 0, 0, -seen % SHAPES
    if mask is not None:
        mask = pad(pad(mask, (0, -seen % SHAPES), value=-math.inf), (0, 0, 0, -n % SHAPES))
    return pad(q, (0, 0, 0, -n % SHAPES)), (pad(both[0], behind), pad(both[1], behind)), mask
