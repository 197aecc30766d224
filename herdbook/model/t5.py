"""T5 and its children (ChatYuan, Flan-T5; Switch Transformers): an encoder reads, a decoder answers.

T tokens of all documents, of which E the encoder reads and D the decoder; H heads, d a head's width,
n queries, S keys.

    tokens     用 户 ： 你 好 </s>   <pad> 您 好 </s>
    who reads  ├─ the encoder ──┤   ├─ the decoder ─┤
    its row    its own last state   scores what follows

To the rest of Herdbook this is one row of tokens like any other. The start mark (decoder_start_token_id,
T5's <pad>) divides it; a prompt without one gets its end and the mark (`prompt`), and a row of
training data becomes one for each answer in it (`examples`). All of a block's matrices see their
tokens of all documents at once; only attention goes document by document.

The blocks stand in one list, the encoder's first. Raffel et al., 2019 (arXiv:1910.10683).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from herdbook.errors import RequestError
from herdbook.model.attention import Look, attend
from herdbook.model.carried import Carried, State
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder, Ropes
from herdbook.model.layers import Linear, Vector, make_norm
from herdbook.model.layout import Layout, Packed
from herdbook.model.mlp import MLP
from herdbook.model.switch import Switch

#: scores are q·k as they are; the weights were trained to be small enough
LOOK = Look(scale=1.0)


@dataclass(frozen=True, kw_only=True)
class T5Config(DecoderConfig):
    encoder_layers: int  # of `layers`; the rest are the decoder's
    start: int  # the token that the decoder begins with
    end: int  # the token that ends what the encoder reads
    buckets: int = 32  # of distances, each with a bias for each head
    far: int = 128  # the distance from which on all share one
    output_scale: bool = True  # hidden · hidden_size^-½ before the head (v1.0)
    sparse: tuple[int, ...] = ()  # the layers with experts
    capacity: int = 0  # the most tokens of a document that one expert takes
    router_bias: bool = False

    @property
    def plain_head(self) -> bool:
        return super().plain_head and not self.output_scale


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


class T5Attention(nn.Module):
    def __init__(self, config: T5Config, name: str) -> None:
        super().__init__()
        c, self.name = config, name
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
        return self._out([_look(q, k, v, one.read, one.read, one.read_bias) for one in docs])

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
            parts.append(_look(q, keys, values, one.said, every, one.said_bias))
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
            parts.append(_look(q, *mine, one.said, slice(0, len(mine[0])), None))
        return self._out(parts)

    def _out(self, parts: list[Tensor]) -> Tensor:
        y: Tensor = self.o(torch.cat(parts).flatten(1))
        return y


def _look(q: Tensor, k: Tensor, v: Tensor, rows: slice, keys: slice, bias: Tensor | None) -> Tensor:
    """One document's attention: [n, H, d]."""
    q, k, v = (one.transpose(0, 1)[None] for one in (q[rows], k[keys], v[keys]))
    mask = None if bias is None else bias[None]
    return attend(q, k, v, LOOK, mask)[0].transpose(0, 1)


class T5Block(nn.Module):
    def __init__(self, config: T5Config, layer: int) -> None:
        super().__init__()
        c = config
        self.decodes = layer >= c.encoder_layers
        self.attention_norm, self.attention = make_norm(c), T5Attention(c, f"{layer}.self")
        if self.decodes:
            self.cross_norm, self.cross = make_norm(c), T5Attention(c, f"{layer}.cross")
        self.mlp_norm = make_norm(c)
        self.mlp: MLP | Switch = MLP(c)
        if layer in c.sparse:
            self.mlp = Switch(c, c.capacity, c.router_bias, f"{layer}.experts")

    def forward(self, x: Tensor, ropes: Ropes, layout: Layout) -> Tensor:
        """x [T, hidden] → the same, its own tokens' rows changed."""
        assert isinstance(layout, Packed)
        division: Division = layout.notes["division"]
        rows = division.said if self.decodes else division.read
        if not len(rows):
            return x
        h = x[rows]
        seen = self.attention_norm(h)
        if self.decodes:
            h = h + self.attention.decode(seen, division)
            h = h + self.cross.cross(self.cross_norm(h), x[division.read], division)
        else:
            h = h + self.attention.encode(seen, division)
        seen = self.mlp_norm(h)
        if isinstance(self.mlp, Switch):
            docs = [
                (one.said if self.decodes else one.read, one.state) for one in division.documents
            ]
            h = h + self.mlp(
                seen, [(rows, state) for rows, state in docs if rows.stop > rows.start]
            )
        else:
            h = h + self.mlp(seen)
        return x.index_copy(0, rows, h)


class T5(Decoder):
    memory = "state"
    whole_prompts = True
    peft_task = "SEQ_2_SEQ_LM"

    def __init__(self, config: T5Config, *, headless: bool = False) -> None:
        super().__init__(config, headless=headless)
        self.axes = config
        self.encoder_norm = make_norm(config)
        self.encoder_bias = Vector(config.buckets, config.heads)
        self.decoder_bias = Vector(config.buckets, config.heads)

    def make_block(self, layer: int) -> nn.Module:
        assert isinstance(self.config, T5Config)
        return T5Block(self.config, layer)

    # --- rows of tokens ---

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """Of a text: its end and the mark behind it. Rows that have a mark stay as they are."""
        ids = list(ids)
        if ids[:1] == [self.axes.start]:
            raise RequestError(
                f"a prompt that begins with token {self.axes.start}",
                rule="leaves the encoder nothing to read: that token begins the reply",
                next="put the prompt's text before it",
            )
        if self.axes.start in ids:
            return ids
        return ids + [self.axes.end] * (ids[-1:] != [self.axes.end]) + [self.axes.start]

    def examples(
        self, ids: Sequence[int], mask: Sequence[bool]
    ) -> list[tuple[list[int], list[bool]]]:
        """One for each run of trained tokens: all before it is read, the run is said."""
        found = []
        edges = [
            i for i in range(len(ids) + 1) if (i > 0 and mask[i - 1]) != (i < len(ids) and mask[i])
        ]
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            read = self.prompt([id for id in ids[:first] if id != self.axes.start])
            said = list(ids[first:last])
            found.append((read + said, [False] * len(read) + [True] * len(said)))
        return found

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """A document without a mark is what is said to an empty prompt: [T, hidden] as everywhere."""
        assert isinstance(layout, Packed)
        begun = isinstance(layout, Carried)
        documents = torch.split(ids, list(layout.lengths))
        if begun or all((one == self.axes.start).any() for one in documents):
            return super().forward(ids, layout)
        empty = ids.new_tensor(self.prompt([]))
        rows, keep = [], []
        for one in documents:
            bare = not bool((one == self.axes.start).any())
            rows.append(torch.cat([empty, one]) if bare else one)
            keep.append(torch.arange(len(rows[-1])) >= (len(empty) if bare else 0))
        whole = super().forward(torch.cat(rows), Packed([len(row) for row in rows], ids.device))
        return whole[torch.cat(keep)]

    def _divide(self, ids: Tensor, layout: Packed) -> Division:
        states = layout.states if isinstance(layout, Carried) else [None] * len(layout.lengths)
        division = Division(ids.new_empty(0), ids.new_empty(0))
        read: list[int] = []
        said: list[int] = []
        at = 0
        for length, state, mine in zip(
            layout.lengths, states, torch.split(ids, list(layout.lengths)), strict=True
        ):
            before = state.get("said", 0) if state is not None else 0
            cut = 0
            if not before:
                marks = (mine == self.axes.start).nonzero()
                cut = int(marks[0]) if len(marks) else 0
                if not cut:
                    raise RequestError(
                        f"a row of {length} tokens, token {self.axes.start} not among them or first",
                        rule="is not divided into what the encoder reads and what the decoder says",
                        next="put the model's decoder_start_token_id between the two",
                    )
            one = Document(
                slice(len(read), len(read) + cut),
                slice(len(said), len(said) + length - cut),
                state,
                before,
            )
            if state is not None:
                state["said"] = before + length - cut
            if cut:
                one.read_bias = self._bias(self.encoder_bias, 0, cut, both_ways=True)
            one.said_bias = self._bias(self.decoder_bias, before, before + length - cut)
            division.documents.append(one)
            read += range(at, at + cut)
            said += range(at + cut, at + length)
            at += length
        division.read = torch.tensor(read, dtype=torch.int64, device=ids.device)
        division.said = torch.tensor(said, dtype=torch.int64, device=ids.device)
        return division

    def _bias(self, table: Vector, start: int, end: int, *, both_ways: bool = False) -> Tensor:
        """Of queries `start` to `end` on the keys before `end`: [H, n, end], −∞ where none looks."""
        keys = torch.arange(end, device=table.weight.device)
        distance = keys - keys[start:, None]
        found = table.weight[bucket(distance, self.axes.buckets, self.axes.far, both_ways)]
        found = found.permute(2, 0, 1)
        return found if both_ways else found.masked_fill(distance > 0, float("-inf"))

    # --- the passes ---

    def start(self, ids: Tensor, layout: Layout) -> Tensor:
        assert isinstance(layout, Packed)
        layout.notes["division"] = self._divide(ids, layout)
        return super().start(ids, layout)

    def through(self, x: Tensor, layout: Layout, first: int = 0, last: int | None = None) -> Tensor:
        """Behind the last block of each stack, its norm."""
        assert isinstance(layout, Packed)
        division: Division = layout.notes["division"]
        assert self.norm is not None
        ends = {
            self.axes.encoder_layers: (self.encoder_norm, division.read),
            self.axes.layers: (self.norm, division.said),
        }
        for layer in range(first, self.axes.layers if last is None else last):
            x = super().through(x, layout, layer, layer + 1)
            if layer + 1 in ends:
                norm, rows = ends[layer + 1]
                x = x.index_copy(0, rows, norm(x[rows]))
        return x

    def finish(self, x: Tensor) -> Tensor:
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        scale = self.config.hidden**-0.5 if self.axes.output_scale else 1.0
        return super().logits(hidden * scale)
