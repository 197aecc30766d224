"""Models that carry a state of their own from token to token instead of keys and values in pages.

B documents of one length L, T tokens of all documents, end to end.

`Packed` starts every document from nothing; `Carried` goes on with documents that were begun before,
each with its state: a dictionary in which the model keeps what it likes. A model's code is the same
under both, so decoding token by token is the same computation as reading a document whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from herdbook.model.layout import Packed

#: what a model remembers of one document; empty before its first token
State = dict[str, Any]


class Carried(Packed):
    """The next `lengths[i]` tokens of document i, whose state is `states[i]` and is moved on."""

    def __init__(
        self, lengths: Sequence[int], states: Sequence[State], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(lengths, device)
        assert len(states) == len(lengths)
        self.states = list(states)


def by_length(layout: Packed, compute: Callable[..., Tensor], *flat: Tensor) -> Tensor:
    """`compute` for the documents of each length together, and its results on the flat axis again.

    flat: tensors [T, …]. compute(states, *[B, L, …]) → [B, L, …]; states are those of the B
    documents, or None where they start from nothing and nobody goes on with them.
    """
    states = layout.states if isinstance(layout, Carried) else None
    parts = []
    for group in layout.groups:
        mine = None
        if states is not None:
            members = zip(layout.lengths, states, strict=True)
            mine = [state for length, state in members if length == group.length]
        batch = (one[group.rows].view(group.count, group.length, *one.shape[1:]) for one in flat)
        parts.append(compute(mine, *batch).flatten(0, 1))
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole if layout.back is None else whole[layout.back]
