"""The decoder: one module for every family, called on a flat axis of tokens and a layout.

T tokens, H query heads, KV key/value heads, D head_dim, ffn inner width.

    embed → layers × (x + attention(norm(x)); x + mlp(norm(x))) → norm → head

There is no batch axis and no padding: documents of a pack, or one decoding step of many chats, lie
end to end, and the layout knows who may see whom. Everything but attention works token by token, so
it need not know.

Where further axes go (facts of the families, not written until a family needs one): another norm or
its place: `Block`; a parallel residual or α: `Block.forward`; ALiBi, learned positions, a partial or
interleaved rotation: `Attention.forward` and `Rotary`; softcaps and other scales: `Attention`,
`Decoder.logits`; ungated MLP, experts: `MLP`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from herdbook.errors import FileError
from herdbook.model.config import DecoderConfig
from herdbook.model.layers import Embedding, Linear, RMSNorm, Rotary, rotate
from herdbook.model.layout import Layout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Attention(nn.Module):
    """Grouped-query attention: H query heads share KV heads of keys and values."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.layer, self.window = layer, c.window(layer)
        self.head_dim, self.scale = c.head_dim, c.head_dim**-0.5
        self.q = Linear(c.hidden, c.heads * c.head_dim, c.qkv_bias)
        self.k = Linear(c.hidden, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = Linear(c.hidden, c.kv_heads * c.head_dim, c.qkv_bias)
        self.o = Linear(c.heads * c.head_dim, c.hidden, c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        q, k, v = (one(x).unflatten(-1, (-1, self.head_dim)) for one in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        out = layout.attend(self.layer, q, k, v, scale=self.scale, window=self.window)
        y: Tensor = self.o(out.flatten(-2))
        return y


class MLP(nn.Module):
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        self.gate = Linear(c.hidden, c.ffn, c.mlp_bias)
        self.up = Linear(c.hidden, c.ffn, c.mlp_bias)
        self.down = Linear(c.ffn, c.hidden, c.mlp_bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return y


class Block(nn.Module):
    """One layer: norm before each part, residual around it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, layout)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class Decoder(nn.Module):
    """ids [T] and a layout → hidden [T, hidden]; `logits` only for the tokens that need them.

    head is None when it is tied to the embedding or when the source has none.
    family and source_config say under which names and keys the model is saved again.
    """

    head: Linear | None

    def __init__(self, config: DecoderConfig, *, headless: bool = False) -> None:
        super().__init__()
        self.config, self.headless = config, headless
        self.family: str = "llama"
        self.source_config: dict[str, Any] = {}
        self.embed = Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)
        own = not (config.tied or headless)
        self.head = Linear(config.hidden, config.vocab) if own else None
        self.rotary = Rotary(config)

    @property
    def dtype(self) -> torch.dtype:
        """The format that the hidden state is computed in."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """ids int64 [T] → [T, hidden] after the final norm."""
        hidden: Tensor = self.norm(self.through(self.embed(ids), layout))
        return hidden

    def through(self, x: Tensor, layout: Layout, first: int = 0, last: int | None = None) -> Tensor:
        """x [T, hidden] through the blocks `first` up to `last` (to the end without it)."""
        rope = self.rotary(layout.positions, x.dtype)
        for block in self.blocks[first:last]:
            x = block(x, rope, layout)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] → float32 [T, vocab]."""
        self.need_head()
        project = self.embed.project if self.head is None else self.head
        return project(hidden).float()

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [vocab, hidden], dequantised where it has to be."""
        self.need_head()
        layer = self.embed if self.head is None else self.head
        weight = getattr(layer, "weight", None)
        return layer.dense(self.dtype) if weight is None else weight

    def need_head(self) -> None:
        if self.headless:
            raise FileError(
                "this model has no head (no lm_head.weight, and its config does not tie one)",
                rule="so it gives hidden states but no logits",
                next="use its hidden states, or a checkpoint saved with the head",
            )

    def parameter_count(self) -> int:
        """Weights that the model stands for, quantised ones too; a tied head counts once."""
        with torch.device("meta"):
            plain = Decoder(self.config, headless=self.headless)
        return sum(p.numel() for p in plain.parameters())
