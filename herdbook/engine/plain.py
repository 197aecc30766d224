"""One forward pass over a scheduled batch by PyTorch: every family, every device, and adapters.

`Paged` writes the new keys and values into the pages and lets each sequence look at its own. On a GPU
`Tiled` does so in one kernel, and a step that only decodes is recorded and replayed (graphs.py).
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from herdbook.engine import graphs
from herdbook.engine.cache import Cache
from herdbook.engine.corrections import applied
from herdbook.engine.paged import Paged
from herdbook.engine.reading import read
from herdbook.engine.sequence import Sequence
from herdbook.engine.store import Store
from herdbook.engine.tiled import kernel_for, tiled
from herdbook.model.carried import Carried
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Layout


class Plain:
    """The pass over a cache of its own, or over the native step's."""

    def __init__(
        self, decoder: Decoder, pages: int, page_tokens: int, kind: str, store: Store | None
    ) -> None:
        self.decoder, self.device = decoder, decoder.device
        self.kernel = kernel_for(self.device.type) if decoder.memory == "pages" else None
        records = self.kernel is not None and graphs.recordable(decoder)
        self.cache = Cache(decoder, pages + records, page_tokens, getattr(torch, kind), store)
        self.graphs: graphs.Graphs | None = None
        if self.kernel is not None and records:
            self.graphs = graphs.Graphs(decoder, self.cache, self.kernel)

    @torch.inference_mode()
    def __call__(self, batch: Many[Sequence]) -> np.ndarray | None:
        """Logits float32 [R, V]; the head is computed only where they are wanted."""
        if self.graphs is not None and self.graphs.serves(batch):
            return _array(self.graphs.run(batch))
        ids: list[int] = []
        wanted: list[int] = []
        for sequence in batch:
            ids += sequence.ids[sequence.computed : sequence.computed + sequence.scheduled]
            wanted += range(len(ids) - sequence.wanted, len(ids))
        layout: Layout
        if self.kernel is not None:
            layout = tiled(self.cache, batch, self.decoder.config, self.kernel, self.device)
        elif self.decoder.memory == "pages":
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
    found: np.ndarray = tensor.float().cpu().numpy()
    return found
