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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from herdbook.errors import RequestError
from herdbook.model.attention import Look
from herdbook.model.biased import Answering, BiasedAttention, Division, Document, bucket
from herdbook.model.carried import Carried
from herdbook.model.decoder import Ropes
from herdbook.model.layers import Vector, make_norm
from herdbook.model.layout import Layout, Packed
from herdbook.model.mlp import MLP
from herdbook.model.own_configs import T5Config
from herdbook.model.switch import Switch

#: scores are q·k as they are; the weights were trained to be small enough
LOOK = Look(scale=1.0)


class T5Block(nn.Module):
    def __init__(self, config: T5Config, layer: int) -> None:
        super().__init__()
        c = config
        self.decodes = layer >= c.encoder_layers
        self.attention_norm, self.attention = (
            make_norm(c),
            BiasedAttention(c, f"{layer}.self", LOOK),
        )
        if self.decodes:
            self.cross_norm, self.cross = make_norm(c), BiasedAttention(c, f"{layer}.cross", LOOK)
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


class T5(Answering):
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

    def asks(self, ids: Tensor) -> bool:
        return bool((ids == self.axes.start).any())

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
