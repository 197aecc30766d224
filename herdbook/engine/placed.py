"""What the layouts over pages share: where a step's tokens stand, and that pages take what is new.

Shapes: T tokens of the whole batch, H heads, KV key/value heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from herdbook.engine.cache import Cache
from herdbook.engine.sequence import Sequence
from herdbook.model.attention import Look
from herdbook.model.config import DecoderConfig
from herdbook.model.soft import Prefix, Prompt, Soft

#: virtual tokens of a step: whose, their rows in the batch, and which of them they are
Virtual = tuple[Soft, slice, slice]


class Placed:
    """positions: of the tokens, [T] or [T, 2]. slots: [T], their places in the cache."""

    def __init__(
        self, cache: Cache, positions: Tensor, slots: Tensor, virtual: Many[Virtual] = ()
    ) -> None:
        self._cache, self.positions, self._slots = cache, positions, slots
        self._virtual = virtual

    def begin(self, x: Tensor, soft: Soft | None, *, shift: bool) -> Tensor:
        """Virtual tokens are tokens of the sequences here, each with its own, in pages like all."""
        for its, rows, which in self._virtual:
            if isinstance(its, Prompt):
                x[rows] = its.rows[which].to(x.dtype)
        return x

    def end(self, x: Tensor) -> Tensor:
        return x

    def find_contexts(self, ids: Tensor, config: DecoderConfig) -> None:
        """The engine found them when the prompts came; a step has only some of their tokens."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        """q [T, H, D] looks at keys and values of its own sequence, at or before itself."""
        for its, rows, which in self._virtual:
            if isinstance(its, Prefix):  # what was computed there counts for nothing
                k[rows], v[rows] = (one[which] for one in its.before(layer, k.dtype))
        self._cache.write(layer, self._slots, k, v)
        return self._look(layer, q, k, v, look)

    def _look(self, layer: int, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        """The same, once k and v [T, KV, D] are in the pages."""
        raise NotImplementedError


def positions_of(batch: Many[Sequence], device: torch.device | str) -> Tensor:
    """[T], or [T, 2] where a model's tokens have two."""
    spans = [(one, one.computed, one.computed + one.scheduled) for one in batch]
    places = [one.context.places(start, end, device) for one, start, end in spans if one.context]
    if places:  # in a prefix model all have one
        return torch.cat(places)
    return torch.tensor([at for _, *span in spans for at in range(*span)], device=device)


def slots_of(batch: Many[Sequence], page_tokens: int) -> list[int]:
    """page × page_tokens + place in the page."""
    return [
        one.pages[at // page_tokens] * page_tokens + at % page_tokens
        for one in batch
        for at in range(one.computed, one.computed + one.scheduled)
    ]


def virtual_of(batch: Many[Sequence]) -> list[Virtual]:
    """The virtual tokens that the step computes."""
    found: list[Virtual] = []
    at = 0
    for one in batch:
        if one.soft is not None and one.computed < one.front:
            last = min(one.front, one.computed + one.scheduled)
            rows = slice(at, at + last - one.computed)
            found.append((one.soft, rows, slice(one.computed, last)))
        at += one.scheduled
    return found
