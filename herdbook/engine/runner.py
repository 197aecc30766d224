"""The runner: one forward pass over everything that a step has scheduled.

Shapes: T tokens of the whole batch, R of them with logits, V vocabulary.

The tokens of all sequences lie one after another in one row of T tokens, without padding: the
linear layers see one matrix, and only attention asks whose token is whose. `Paged` answers that:
it writes the new keys and values into the pages and lets each sequence look at its own. On a GPU
`Tiled` does so in one kernel, and a step that only decodes is recorded and replayed (graphs.py).
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from herdbook.engine import graphs, native
from herdbook.engine.adapters import applied
from herdbook.engine.cache import Cache
from herdbook.engine.paged import Paged
from herdbook.engine.reading import read
from herdbook.engine.sequence import Sequence
from herdbook.engine.tiled import kernel_for, tiled
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
        paged = decoder.memory == "pages"
        self._kernel = kernel_for(self.device.type) if paged else None
        records = self._kernel is not None and graphs.recordable(decoder)
        self.cache = Cache(decoder, pages + records, page_tokens, dtype, dimensions_first=first)
        self.graphs: graphs.Graphs | None = None
        if self._kernel is not None and records:
            self.graphs = graphs.Graphs(decoder, self.cache, self._kernel)

    @property
    def copies(self) -> list[Tensor]:
        """Weights that are held a second time, in the native step's own order."""
        return [] if self._native is None else self._native.kept

    @torch.inference_mode()
    def run(self, batch: Many[Sequence]) -> Tensor | None:
        """Logits [R, V] after the R tokens of the batch that want them, in its order; None if none do.

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
        rows: dict[int, Tensor] = {}  # a sequence's [wanted, V]
        for some, run in ((mine, self._step), (others, self._pass)):
            found = run(some) if some else None
            if found is not None:
                each = torch.split(found, [one.wanted for one in some])
                rows |= {id(one): its for one, its in zip(some, each, strict=True)}
        ordered = [rows[id(one)] for one in batch if one.wanted]
        return torch.cat(ordered) if ordered else None

    def _step(self, batch: Many[Sequence]) -> Tensor:
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
        read(batch, x, self.decoder.finish, self._native.head)
        return logits

    def _pass(self, batch: Many[Sequence]) -> Tensor | None:
        """The same by PyTorch; the head is computed only where logits are wanted."""
        if self.graphs is not None and self.graphs.serves(batch):
            return self.graphs.run(batch)
        ids: list[int] = []
        wanted: list[int] = []
        for sequence in batch:
            ids += sequence.ids[sequence.computed : sequence.computed + sequence.scheduled]
            wanted += range(len(ids) - sequence.wanted, len(ids))
        layout: Layout
        if self._kernel is not None:
            c = self.decoder.config
            layout = tiled(self.cache, batch, c, self._kernel, self.device)
        elif self.decoder.memory == "pages":
            layout = Paged(self.cache, batch, self.device)
        else:
            lengths, states = [one.scheduled for one in batch], [one.state for one in batch]
            layout = Carried(lengths, states, self.device)
        with applied(batch):
            known = torch.tensor(ids, device=self.device).clamp_min_(0)  # a virtual token: any
            hidden = self.decoder(known, layout)  # [T, hidden]
        read(batch, hidden, lambda rows: rows, self.decoder.logits)
        if not wanted:
            return None
        return self.decoder.logits(hidden[torch.tensor(wanted, device=self.device)])
