"""The decoder: one module for every family, called on a flat axis of tokens and a layout.

T tokens, H query heads, KV key/value heads, D head_dim, ffn inner width.

    embed → layers × (x + attention(norm(x)); x + mlp(norm(x))) → norm → head

There is no batch axis and no padding: documents of a pack, or one decoding step of many chats, lie
end to end, and the layout knows who may see whom. Everything but attention works token by token, so
it need not know.

The axes (herdbook/model/config.py) say what a family puts in place of each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from herdbook.errors import RequestError
from herdbook.model.attention import Look, alibi_slopes
from herdbook.model.config import DecoderConfig
from herdbook.model.fused import as_before
from herdbook.model.interface import Model
from herdbook.model.layers import (
    Embedding,
    Int8Embedding,
    Linear,
    RMSNorm,
    Rotary,
    make_norm,
    rotate,
)
from herdbook.model.layout import Layout
from herdbook.model.lora import together
from herdbook.model.mlp import MLP, Experts
from herdbook.model.soft import Soft
from herdbook.model.streamed import Streamed

#: cos and sin of the layers that see all, and of those with a window where they have their own
Ropes = tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]


class Attention(nn.Module):
    """Grouped-query attention: H query heads share KV heads of keys and values."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.layer, self.head_dim = layer, c.head_dim
        self.look = look_of(c, layer)
        self.local = bool(c.rope_local_base) and c.window(layer) is not None
        self.q = Linear(c.hidden, c.heads * c.head_dim, c.qkv_bias)
        self.k = Linear(c.hidden, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = Linear(c.hidden, c.kv_heads * c.head_dim, c.qkv_bias)
        self.o = Linear(c.heads * c.head_dim, c.hidden, c.out_bias)
        plus = c.norm == "rms1p"
        self.q_norm = RMSNorm(c.head_dim, c.eps, plus) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.eps, plus) if c.qk_norm else None

    def forward(self, x: Tensor, ropes: Ropes, layout: Layout) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        layers = (self.q, self.k, self.v)
        all_three = together(x, *layers)
        if all_three is None:
            parts: Sequence[Any] = [one(x) for one in layers]
        else:
            parts = torch.split(all_three, [one.outputs for one in layers], -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope := ropes[self.local]:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y: Tensor = self.o(layout.attend(self.layer, q, k, v, self.look).flatten(-2))
        return y


def look_of(c: DecoderConfig, layer: int) -> Look:
    """How a layer of this configuration looks at its keys."""
    scale = c.attention_scale or c.head_dim**-0.5
    slopes = alibi_slopes(c.heads) if c.position == "alibi" else ()
    return Look(scale, c.window(layer), c.attention_softcap, slopes, c.alibi_rounded)


class Block(nn.Module):
    """One layer: attention and MLP, each normed before or after, with a residual around it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.place, self.residual, self.alpha = c.norm_place, c.residual, c.residual_alpha
        self.attention_norm = make_norm(c)
        self.attention = Attention(c, layer)
        self.mlp_norm = make_norm(c) if c.residual != "parallel1" else None
        self.mlp = Experts(c) if c.experts else MLP(c)
        if c.norm_place == "sandwich":
            self.after_attention_norm, self.after_mlp_norm = make_norm(c), make_norm(c)

    def forward(self, x: Tensor, ropes: Ropes, layout: Layout) -> Tensor:
        if self.residual != "sequential":
            seen = self.attention_norm(x)
            also = seen if self.mlp_norm is None else self.mlp_norm(x)
            both: Tensor = x + self.attention(seen, ropes, layout) + self.mlp(also)
            return both
        assert self.mlp_norm is not None
        if self.place == "pre":
            x = x + self.attention(self.attention_norm(x), ropes, layout)
            y: Tensor = x + self.mlp(self.mlp_norm(x))
        elif self.place == "sandwich":
            seen = self.attention(self.attention_norm(x), ropes, layout)
            x = x + self.after_attention_norm(seen)
            y = x + self.after_mlp_norm(self.mlp(self.mlp_norm(x)))
        elif self.place == "post":
            x = self.attention_norm(x + self.attention(x, ropes, layout))
            y = self.mlp_norm(x + self.mlp(x))
        else:
            x = self.attention_norm(x)
            x = self.mlp_norm(self.alpha * x + self.attention(x, ropes, layout))
            y = self.alpha * x + self.mlp(x)
        return y


class Decoder(nn.Module, Model):
    """ids [T] and a layout → hidden [T, hidden]; `logits` only for the tokens that need them.

    head is None when it is tied to the embedding or when the source has none.
    family and source_config say under which names and keys the model is saved again.
    """

    head: Linear | None
    #: training keeps what enters each block, and computes the rest again for its gradient
    recompute = False
    #: where its blocks' matrices come from, if they do not stay in memory
    streamed: Streamed | None = None
    #: its rotation is another than its source's (see model/stretch.py)
    stretched = False
    #: what PEFT calls its task
    peft_task = "CAUSAL_LM"

    def __init__(self, config: DecoderConfig, *, headless: bool = False) -> None:
        super().__init__()
        c = self.config = config
        self.headless = headless
        self.source_config: dict[str, Any] = {}
        width = c.embed_dim or c.hidden
        self.embed: Embedding | Int8Embedding = Embedding(c.vocab, width)
        learned = c.position == "learned"
        self.places = Embedding(c.max_pos + c.position_offset, c.hidden) if learned else None
        self.project_in = Linear(width, c.hidden) if c.embed_dim else None
        self.embed_norm = make_norm(c) if c.embed_norm else None
        self.blocks = nn.ModuleList(self.make_block(i) for i in range(c.layers))
        self.norm = make_norm(c) if c.norm_place != "post" else None
        self.project_out = Linear(c.hidden, width) if c.embed_dim else None
        own = not (c.tied or headless)
        self.head = Linear(width, c.vocab, c.head_bias) if own else None
        #: of a classifier: scores of its labels
        self.score = Linear(c.hidden, len(c.labels)) if c.labels else None
        turning = c.position.startswith("rope")
        self.rotary = Rotary(c) if turning else None
        self.local_rotary = Rotary(c, c.rope_local_base) if c.rope_local_base else None
        #: virtual tokens that were trained to stand before every document
        self.soft: Soft | None = None

    def make_block(self, layer: int) -> nn.Module:
        return Block(self.config, layer)

    def module(self) -> Decoder:
        return self

    @property
    def kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def place(self) -> str:
        return self.device.type

    @property
    def dtype(self) -> torch.dtype:
        """The format that the hidden state is computed in."""
        return next(self.blocks[0].parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.blocks[0].parameters()).device

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """ids int64 [T] → [T, hidden] after the final norm."""
        return self.finish(self.through(self.start(ids, layout), layout))

    def start(self, ids: Tensor, layout: Layout) -> Tensor:
        """ids [T] → what the first block reads, [T, hidden]."""
        if self.config.prefix is not None:
            layout.find_contexts(ids, self.config)
        x: Tensor = self.embed(ids)
        if self.config.embed_scale != 1.0:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype, device="cpu").item()
        soft = None if self.soft is None or self.soft.bypassed else self.soft
        x = layout.begin(x, soft, shift=self.config.prefix is None)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.places is not None:
            x = x + self.places(layout.positions + self.config.position_offset)
        return x

    def through(self, x: Tensor, layout: Layout, first: int = 0, last: int | None = None) -> Tensor:
        """x [T, hidden] through the blocks `first` up to `last` (to the end without it)."""
        ropes = (
            self.rotary(layout.positions, x.dtype) if self.rotary else None,
            self.local_rotary(layout.positions, x.dtype) if self.local_rotary else None,
        )
        for block in self.blocks[first:last]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, ropes, layout, use_reentrant=False, context_fn=as_before)
            else:
                x = block(x, ropes, layout)
        return layout.end(x) if last is None else x

    def finish(self, x: Tensor) -> Tensor:
        """The last block's [T, hidden] after the final norm (where there is one)."""
        y: Tensor = x if self.norm is None else self.norm(x)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] → float32 [T, vocab]."""
        self.need_head()
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        layer = self.head_layer
        project = getattr(layer, "project", layer)  # an embedding that the head is tied to
        logits: Tensor = project(hidden).float()
        if self.config.head_norm:
            logits = logits / layer.dense(torch.float32).norm(dim=1)
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def scores(self, hidden: Tensor) -> Tensor:
        """A classifier's, of its labels: [T, hidden] → float32 [T, labels]."""
        if self.score is None:
            raise RequestError(
                "this model has no labels",
                rule="so it classifies nothing",
                next="train one that does (step Classify)",
            )
        scores: Tensor = self.score(hidden).float()
        return scores

    @property
    def head_layer(self) -> Linear | Embedding | Int8Embedding:
        """The layer that gives the logits: the head, or the embedding that it is tied to."""
        return self.embed if self.head is None else self.head

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [vocab, hidden] as it multiplies, dequantised where it has to be.

        Where `config.plain_head` does not hold, more belongs to the logits than this."""
        self.need_head()
        weight = getattr(self.head_layer, "weight", None)
        weight = self.head_layer.dense(self.dtype) if weight is None else weight
        return F.normalize(weight) if self.config.head_norm else weight

    def parameter_count(self) -> int:
        """Weights that the model stands for, quantised ones too; a tied head counts once."""
        with torch.device("meta"):
            plain = type(self)(self.config, headless=self.headless)
        return sum(p.numel() for p in plain.parameters())
