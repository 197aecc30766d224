"""The runner: one forward pass over everything that a step has scheduled.

Shapes: T tokens of the whole batch, R of them with logits, V vocabulary.

The tokens of all sequences lie one after another in one row of T tokens, without padding: the
linear layers see one matrix, and only attention asks whose token is whose. `Paged` answers that:
it writes the new keys and values into the pages and lets each sequence look at its own.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from herdbook.engine import native
from herdbook.engine.adapters import applied
from herdbook.engine.cache import Cache
from herdbook.engine.paged import Paged
from herdbook.engine.reading import read
from herdbook.engine.sequence import Sequence
from herdbook.model.carried import Carried
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Layout


class Runner:
    """Runs the decoder over a scheduled batch, over a cache of its own."""

    def __init__(
        self, decoder: Decoder, pages: int, page_tokens: int, dtype: torch.dtype | None = None
    ) -> None:
        self.decoder, self.device = decoder, decoder.device
        fits = page_tokens % native.TILE == 0 and (dtype or decoder.dtype) in native.CACHES
        self._native = native.step_for(decoder) if fits else None
        first = self._native is not None
        self.cache = Cache(decoder, pages, page_tokens, dtype, dimensions_first=first)

    @property
    def copies(self) -> list[Tensor]:
        """Weights that are held a second time, in the native step's own order."""
        return [] if self._native is None else self._native.kept

    @torch.inference_mode()
    def run(self, batch: Many[Sequence]) -> np.ndarray | None:
        """Logits float32 [R, V] after the R tokens of the batch that want them, in its order; None if none do.

        Where there is a native step, what a sequence gets does not depend on who else is served, to
        the last bit. Those with an adapter go the PyTorch way beside it: into the same cache, but into
        pages that are no others' (Sequence.hash_pages), with inputs rounded as PyTorch's layers do it
        (bfloat16, or in a large batch not at all), so alike only up to that.
        """
        if self._native is None:
            return self._pass(batch)
        mine = [one for one in batch if one.adapter is None]
        others = [one for one in batch if one.adapter is not None]
        if not others:
            logits = self._step(mine)
            return logits if len(logits) else None
        rows: dict[int, np.ndarray] = {}  # a sequence's [wanted, V]
        for some, run in ((mine, self._step), (others, self._pass)):
            found = run(some) if some else None
            if found is not None:
                each = np.split(found, list(accumulate(one.wanted for one in some))[:-1])
                rows |= {id(one): its for one, its in zip(some, each, strict=True)}
        ordered = [rows[id(one)] for one in batch if one.wanted]
        return np.concatenate(ordered) if ordered else None

    def _step(self, batch: Many[Sequence]) -> np.ndarray:
        """Logits [R, V] by the native step, which knows no adapters."""
        assert self._native is not None
        spans = [
            native.Span(
                ids=one.ids[one.computed : one.computed + one.scheduled],
                start=one.computed,
                pages=one.pages,
                wanted=one.wanted,
            )
            for one in batch
        ]
        logits, x = self._native(self.cache, spans)
        step = self._native
        read(
            batch, x, lambda rows: _array(self.decoder.finish(rows)), lambda r: _array(step.head(r))
        )
        return _array(logits)

    def _pass(self, batch: Many[Sequence]) -> np.ndarray | None:
        """The same by PyTorch; the head is computed only where logits are wanted."""
        ids: list[int] = []
        wanted: list[int] = []
        for sequence in batch:
            ids += sequence.ids[sequence.computed : sequence.computed + sequence.scheduled]
            wanted += range(len(ids) - sequence.wanted, len(ids))
        layout: Layout
        if self.decoder.memory == "pages":
            layout = Paged(self.cache, batch, self.device)
        else:
            lengths, states = [one.scheduled for one in batch], [one.state for one in batch]
            layout = Carried(lengths, states, self.device)
        with applied(batch):
            known = torch.tensor(ids, device=self.device).clamp_min_(0)  # a virtual token: any
            hidden = self.decoder(known, layout)  # [T, hidden]
        read(batch, hidden, _array, lambda rows: _array(self.decoder.logits(rows)))
        return _array(self.decoder.logits(hidden[wanted])) if wanted else None


def _array(tensor: Tensor) -> np.ndarray:
    """float32, on the CPU."""
    return tensor.float().cpu().numpy()
