"""One forward pass over a scheduled batch by PyTorch: every family, every device, and adapters."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from herdbook.engine.cache import Cache
from herdbook.engine.corrections import applied
from herdbook.engine.paged import Paged
from herdbook.engine.reading import read
from herdbook.engine.sequence import Sequence
from herdbook.engine.store import Store
from herdbook.model.carried import Carried
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Layout


class Plain:
    """The pass over a cache of its own, or over the native step's."""

    def __init__(
        self, decoder: Decoder, pages: int, page_tokens: int, kind: str, store: Store | None
    ) -> None:
        self.decoder, self.device = decoder, decoder.device
        self.cache = Cache(decoder, pages, page_tokens, getattr(torch, kind), store)

    @torch.inference_mode()
    def __call__(self, batch: Many[Sequence]) -> np.ndarray | None:
        """Logits float32 [R, V]; the head is computed only where they are wanted."""
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
    found: np.ndarray = tensor.float().cpu().numpy()
    return found
