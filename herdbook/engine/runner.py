"""The runner: one forward pass over everything that a step has scheduled.

Shapes: T tokens of the whole batch, R of them with logits, V vocabulary.

The tokens of all sequences lie one after another in one row of T tokens, without padding: the
linear layers see one matrix, and only attention asks whose token is whose. Either the native step
computes them (native.py), or PyTorch (plain.py).
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from herdbook.engine import native
from herdbook.engine.compiled import library
from herdbook.engine.packaged import Packaged
from herdbook.engine.reading import read
from herdbook.engine.sequence import Sequence
from herdbook.engine.store import NATIVE, Store
from herdbook.model.interface import Model

if TYPE_CHECKING:
    from herdbook.engine.plain import Plain


class Runner:
    """Runs the model over a scheduled batch, over a cache of its own."""

    def __init__(self, model: Model, pages: int, page_tokens: int, kind: str | None = None) -> None:
        self.model, self.kind = model, kind or model.kind
        self._size = pages, page_tokens
        self._native: native.Step | None = None
        self._store: Store | None = None
        if page_tokens % native.TILE == 0 and self.kind in NATIVE:
            self._native = step_for(model)
        if self._native is not None:
            self._store = Store(model.config, pages, page_tokens, self.kind)
        else:
            _ = self.plain  # what does not fit into memory is told now

    @cached_property
    def plain(self) -> Plain:
        """The PyTorch way, over the same cache."""
        from herdbook.engine.plain import Plain

        return Plain(self.model.module(), *self._size, self.kind, self._store)

    @property
    def native_bytes(self) -> int:
        """Of the weights in the native step's own order."""
        return 0 if self._native is None else self._native.nbytes

    def run(self, batch: Many[Sequence]) -> np.ndarray | None:
        """Logits float32 [R, V] after the R tokens of the batch that want them, in its order; None if
        none do.

        Where there is a native step, what a sequence gets does not depend on who else is served, to
        the last bit. Those with an adapter go the PyTorch way beside it: into the same cache, but into
        pages that are no others' (Sequence.hash_pages), with inputs rounded as PyTorch's layers do it
        (bfloat16, or in a large batch not at all), so alike only up to that.
        """
        if self._native is None:
            return self.plain(batch)
        mine = [one for one in batch if one.adapter is None]
        others = [one for one in batch if one.adapter is not None]
        if not others:
            logits = self._step(mine)
            return logits if len(logits) else None
        rows: dict[int, np.ndarray] = {}  # a sequence's [wanted, V]
        for some, run in ((mine, self._step), (others, self.plain)):
            found = run(some) if some else None
            if found is not None:
                each = np.split(found, list(accumulate(one.wanted for one in some))[:-1])
                rows |= {id(one): its for one, its in zip(some, each, strict=True)}
        ordered = [rows[id(one)] for one in batch if one.wanted]
        return np.concatenate(ordered) if ordered else None

    def _step(self, batch: Many[Sequence]) -> np.ndarray:
        """Logits [R, V] by the native step, which knows no adapters."""
        assert self._native is not None and self._store is not None
        spans = [
            native.Span(
                ids=one.ids[one.computed : one.computed + one.scheduled],
                start=one.computed,
                pages=one.pages,
                wanted=one.wanted,
            )
            for one in batch
        ]
        logits, x = self._native(self._store, spans)
        read(batch, x, self._native.finish, self._native.head)
        return logits


def step_for(model: Model) -> native.Step | None:
    """The native step of this model; None where it, the processor or the machine does not fit."""
    if isinstance(model, Packaged):
        return model.step
    from herdbook.engine.kept import kept

    source, found = kept(model.module()), library()
    return None if source is None or found is None else native.Step(source, found)
