"""What T5 and CPM-Bee share: a prompt that is read as a whole, an answer to it, and attention that goes
document by document with a bias of the model's own on the scores.

T tokens at hand, of which E are read by an encoder and D are the decoder's (all, where there is no
encoder); H heads, d a head's width, n queries, S keys of one document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from herdbook.model.attention import Look, attend
from herdbook.model.carried import Carried, State
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.layers import Linear
from herdbook.model.layout import Layout, Packed


def bucket(distance: Tensor, count: int, far: int, both_ways: bool) -> Tensor:
    """distance = key − query, int64 → its bucket: one for each small distance, then wider and wider.

    >>> bucket(torch.tensor([-1, 0, 1, -20, -400]), 32, 128, True).tolist()
    [1, 0, 17, 10, 15]
    >>> bucket(torch.tensor([-1, 0, -20, -400]), 32, 128, False).tolist()
    [1, 0, 17, 31]
    """
    if both_ways:
        count //= 2
        first, distance = count * (distance > 0), distance.abs()
    else:
        first, distance = torch.zeros_like(distance), (-distance).clamp(min=0)
    exact = count // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(far / exact)
    wide = (exact + (share * (count - exact)).long()).clamp(max=count - 1)
    return first + torch.where(distance < exact, distance, wide)


@dataclass
class Document:
    """What of the tokens at hand is one document's."""

    read: slice  # of the E tokens for the encoder; empty where it has read them before
    said: slice  # of the D tokens for the decoder
    state: State | None
    before: int = 0  # tokens that the decoder had before
    #: added to the scores: [H, E, E] within the encoder, [H, n, S] within the decoder
    read_bias: Tensor | None = None
    said_bias: Tensor | None = None


@dataclass
class Division:
    """Who reads which of the T tokens."""

    read: Tensor  # int64 [E]
    said: Tensor  # int64 [D]
    documents: list[Document] = field(default_factory=list)


class BiasedAttention(nn.Module):
    """`name` is its own in the documents' states. out_scale: what goes into the last matrix is
    multiplied by it."""

    def __init__(
        self, config: DecoderConfig, name: str, look: Look, out_scale: float = 1.0
    ) -> None:
        super().__init__()
        c, self.name, self.look, self.out_scale = config, name, look, out_scale
        width = c.heads * c.head_dim
        self.head_dim = c.head_dim
        self.q, self.k, self.v = (Linear(c.hidden, width) for _ in range(3))
        self.o = Linear(width, c.hidden)

    def heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        """[n, hidden] → [n, H, d]."""
        found: Tensor = layer(x).unflatten(-1, (-1, self.head_dim))
        return found

    def encode(self, x: Tensor, division: Division) -> Tensor:
        """x [E, hidden] → [E, hidden]: every token sees its whole document."""
        q, k, v = (self.heads(one, x) for one in (self.q, self.k, self.v))
        docs = [one for one in division.documents if one.read_bias is not None]
        return self._out([self._look(q, k, v, one.read, one.read, one.read_bias) for one in docs])

    def decode(self, x: Tensor, division: Division) -> Tensor:
        """x [D, hidden] → [D, hidden]: a token sees itself and those before it, earlier steps' too."""
        q, k, v = (self.heads(one, x) for one in (self.q, self.k, self.v))
        parts = []
        for one in division.documents:
            keys, values = k[one.said], v[one.said]
            if one.state is not None:
                if one.before:
                    old = one.state[self.name]
                    keys, values = torch.cat([old[0], keys]), torch.cat([old[1], values])
                one.state[self.name] = keys, values
            every = slice(0, len(keys))
            parts.append(self._look(q, keys, values, one.said, every, one.said_bias))
        return self._out(parts)

    def cross(self, x: Tensor, read: Tensor, division: Division) -> Tensor:
        """x [D, hidden] looks at what the encoder made of its document, read [E, hidden]."""
        q = self.heads(self.q, x)
        k = v = q[:0]  # all documents are read already
        if len(read):
            k, v = self.heads(self.k, read), self.heads(self.v, read)
        parts = []
        for one in division.documents:
            mine = k[one.read], v[one.read]
            if one.state is not None:
                mine = one.state.setdefault(self.name, mine)
            parts.append(self._look(q, *mine, one.said, slice(0, len(mine[0])), None))
        return self._out(parts)

    def _out(self, parts: list[Tensor]) -> Tensor:
        y: Tensor = self.o(torch.cat(parts).flatten(1) * self.out_scale)
        return y

    def _look(
        self, q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice, bias: Tensor | None
    ) -> Tensor:
        """One document's attention: [n, H, d]."""
        q, k, v = (one.transpose(0, 1)[None] for one in (q[rows], k[keys], v[keys]))
        mask = None if bias is None else bias[None]
        return attend(q, k, v, self.look, mask)[0].transpose(0, 1)


class Answering(Decoder):
    """A model whose rows are a prompt, which it reads as a whole, and an answer."""

    memory = "state"
    whole_prompts = True

    def asks(self, ids: Tensor) -> bool:
        """Whether this document has a prompt and an answer."""
        raise NotImplementedError

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """A document without a prompt is what is said to an empty one: [T, hidden] as everywhere."""
        assert isinstance(layout, Packed)
        documents = torch.split(ids, list(layout.lengths))
        if isinstance(layout, Carried) or all(map(self.asks, documents)):
            return super().forward(ids, layout)
        empty = ids.new_tensor(self.prompt([]))
        rows, keep = [], []
        for one in documents:
            added = 0 if self.asks(one) else len(empty)
            rows.append(torch.cat([empty[:added], one]))
            keep.append(torch.arange(len(rows[-1]), device=ids.device) >= added)
        whole = super().forward(torch.cat(rows), Packed([len(row) for row in rows], ids.device))
        return whole[torch.cat(keep)]
