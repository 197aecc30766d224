"""CPM-Bee: it reads a tree of texts as a whole and writes an answer (herdbook/model/tree.py).

T tokens, D hidden, H heads; n queries and S keys of one document.

The context sees the context, also what stands behind; an answer's tokens see the context, themselves,
and what stands before them. The scores' bias goes by T5's buckets of distance within a segment, and
by how the two segments stand to each other in the tree between segments. A numbered token's embedding
is turned as position 16 · number would turn it. All matrices multiply x / √inputs (here what goes in
is divided), and x + f(x) is divided by 1.05 after each half of a block.
Source: https://github.com/OpenBMB/CPM-Bee

Left out: the logits of numbered tokens, by which the original copies names such as <mask_1> and
unknown characters into its answer; it writes <mask> and <unk> here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from herdbook.errors import RequestError
from herdbook.model import tree
from herdbook.model.attention import Look
from herdbook.model.biased import Answering, BiasedAttention, Division, Document, bucket
from herdbook.model.carried import Carried, State
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Ropes
from herdbook.model.layers import Vector, make_norm
from herdbook.model.layout import Layout, Packed
from herdbook.model.mlp import MLP
from herdbook.model.own_configs import NUMBER, BeeConfig
from herdbook.model.tree import Tree

SHRINK = 1.05


class BeeMLP(MLP):
    """What goes into each matrix divided by √inputs; x comes so already."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.scale = config.ffn**-0.5

    def forward(self, x: Tensor) -> Tensor:
        assert self.gate is not None
        y: Tensor = self.down(self.activation(self.gate(x)) * self.up(x) * self.scale)
        return y


class BeeBlock(nn.Module):
    def __init__(self, config: BeeConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.scale = c.hidden**-0.5
        self.attention_norm = self.attention = self.mlp_norm = self.mlp = None
        if layer not in c.without_attention:
            look, width = Look(c.head_dim**-0.5), c.heads * c.head_dim
            self.attention_norm = make_norm(c)
            self.attention = BiasedAttention(c, f"{layer}", look, width**-0.5)
        if layer not in c.without_mlp:
            self.mlp_norm, self.mlp = make_norm(c), BeeMLP(c)

    def forward(self, x: Tensor, ropes: Ropes, layout: Layout) -> Tensor:
        """x [T, D] → [T, D]."""
        assert isinstance(layout, Packed)
        if self.attention_norm is not None and self.attention is not None:
            seen = self.attention_norm(x) * self.scale
            x = (x + self.attention.decode(seen, layout.notes["division"])) / SHRINK
        if self.mlp_norm is not None and self.mlp is not None:
            x = (x + self.mlp(self.mlp_norm(x) * self.scale)) / SHRINK
        return x


class CPMBee(Answering):
    def __init__(self, config: BeeConfig, *, headless: bool = False) -> None:
        super().__init__(config, headless=headless)
        self.axes = config
        self.bias = Vector(config.buckets + config.segment_buckets, config.heads)

    def make_block(self, layer: int) -> nn.Module:
        assert isinstance(self.config, BeeConfig)
        return BeeBlock(self.config, layer)

    # --- rows of tokens ---

    @property
    def ids(self) -> int:
        return self.config.vocab * tree.NUMBERS

    def tree(self, data: Mapping[str, Any], encode: Callable[[str], Sequence[int]]) -> list[int]:
        return tree.flatten(data, encode, self.axes.marks)

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """Of a plain text: {"input": text, "<ans>": ""}. A tree that does not end in an answer gets
        one."""
        ids, m = list(ids), self.axes.marks
        key, text = m.first + m.vocab, m.first + 2 * m.vocab
        if not ids:
            ids = [m.first, m.root, m.last]
        elif m.first not in [id % m.vocab for id in ids]:
            ids = [m.first, m.root, m.last, key, *self.axes.input, m.last, text, *ids, m.last]
        if tree.parse(ids, m).answering:
            return ids
        return ids + [m.last] * (ids[-1] != m.last) + [key, m.answer, m.last, text]

    def asks(self, ids: Tensor) -> bool:
        return not all(tree.parse(ids.tolist(), self.axes.marks).context)

    # --- the passes ---

    def start(self, ids: Tensor, layout: Layout) -> Tensor:
        assert isinstance(layout, Packed)
        vocab, width = self.config.vocab, self.config.hidden
        tokens, numbers = ids % vocab, ids // vocab
        layout.notes["division"] = self._divide(ids, layout)
        x: Tensor = super().start(tokens, layout) * width**-0.5
        numbers = torch.where(tokens == self.axes.marks.first, 0, numbers)
        if not numbers.any():
            return x
        half = torch.arange(0, width, 2, device=x.device) / width
        angle = (numbers * NUMBER)[:, None] / self.config.rope_base**half  # [T, D/2]
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        a, b = x.float().chunk(2, -1)
        turned: Tensor = x * cos + torch.cat([-b, a], -1) * sin
        return turned.to(x.dtype)

    def _divide(self, ids: Tensor, layout: Packed) -> Division:
        """Every token is the decoder's; which see which, the bias says."""
        carried = isinstance(layout, Carried)
        division = Division(ids.new_empty(0), torch.arange(len(ids), device=ids.device))
        at = 0
        for number, mine in enumerate(torch.split(ids, list(layout.lengths))):
            state: State | None = layout.states[number] if carried else None  # type: ignore[attr-defined]
            before = 0
            if state is not None and "tree" in state:
                known: Tree = state["tree"]
                before = len(known.segment)
                known.more(len(mine))
            else:
                known = tree.parse(mine.tolist(), self.axes.marks)
            if state is not None:
                state["tree"] = known
            rows = slice(at, at + len(mine))
            one = Document(slice(0, 0), rows, state, before)
            one.said_bias = self._bias(known, before)
            division.documents.append(one)
            at = rows.stop
        return division

    def _bias(self, known: Tree, before: int) -> Tensor:
        """Of the tokens from `before` on: [H, n, S], −∞ where none looks."""
        where = self.bias.weight.device
        segment = torch.tensor(known.segment, device=where)
        context = torch.tensor(known.context, device=where)
        keys = torch.arange(len(segment), device=where)
        distance = keys - keys[before:, None]
        relations = known.relations().to(where)
        if int(relations.max()) > self.axes.segment_buckets:
            raise RequestError(
                "a tree so deep",
                rule=f"has relations beyond the {self.axes.segment_buckets} that this model tells apart",
                next="put its texts nearer to the root",
            )
        relation = relations[segment[before:, None], segment]
        near = bucket(distance, self.axes.buckets, self.axes.far, both_ways=True)
        which = torch.where(relation == 0, near, relation - 1 + self.axes.buckets)
        seen = context | (~context[before:, None] & (distance <= 0))
        bias = self.bias.weight[which].permute(2, 0, 1)
        return bias.masked_fill(~seen, float("-inf"))

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden * self.config.hidden**-0.5)
