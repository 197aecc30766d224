"""Virtual tokens that stand before every document, trained while the model stays as it is.

Shapes: L layers · n virtual tokens · KV key/value heads · D head_dim

`Prefix` (prefix tuning, P-tuning v2): their keys and values in every layer, [L, n, KV, D] each, as
attention sees them (rotated). Li & Liang, 2021 (arXiv:2101.00190); Liu et al., 2021
(arXiv:2110.07602); what ChatGLM-6B was tuned with. `Prompt` (prompt tuning): their rows of the
embedding [n, width], from which the model computes the rest. Lester et al., 2021 (arXiv:2104.08691).

`ProjectedPrefix`: a prefix made by a small MLP from rows of its own, [n, KV·D] → inner → its layers' keys
and values, for which training is steadier (Li & Liang; optional in P-tuning v2). What comes out of it
in the end is the prefix, and that alone is kept.

They take the first n places, and the document's own tokens those behind. In a prefix model, whose
places are counted by its marks, a trained prefix takes none (ChatGLM-6B's own code does so too), and
there is no prompt: a context that sees itself whole would have to see it both ways.

Neither can be merged: there is no weight to merge it into.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from herdbook.errors import ConfigError
from herdbook.model.lora import Adapter

if TYPE_CHECKING:
    from herdbook.model.config import DecoderConfig
    from herdbook.model.decoder import Decoder

#: how far from zero a prefix starts
SPREAD = 0.02


class Soft(Adapter):
    """Virtual tokens of either kind."""

    tokens: int

    def merge(self) -> nn.Module:
        raise ConfigError(
            f"{self.tokens} trained virtual tokens",
            rule="are no change of a weight, so nothing can be merged",
            next="load the adapter's own reference, or serve it beside its base",
        )


class Prefix(Soft):
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.tokens = keys.shape[1]
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def before(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [n, KV, D] each."""
        return self.keys[layer].to(dtype), self.values[layer].to(dtype)


class ProjectedPrefix(Soft):
    """A prefix while it is trained: the layers' keys and values are tanh(rows W₁ᵀ + b₁) W₂ᵀ + b₂."""

    def __init__(self, config: DecoderConfig, tokens: int, inner: int, generator: Any) -> None:
        super().__init__()
        self.tokens, self.heads = tokens, config.kv_heads
        width = config.kv_heads * config.head_dim

        def uniform(inputs: int, *shape: int) -> nn.Parameter:
            """As nn.Linear starts."""
            bound = inputs**-0.5
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.rows = nn.Parameter(torch.empty(tokens, width).normal_(generator=generator))
        self.down, self.down_bias = uniform(width, inner, width), uniform(width, inner)
        layers = config.layers
        self.up = uniform(inner, layers, 2 * width, inner)
        self.up_bias = uniform(inner, layers, 2 * width)

    def before(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [n, KV, D] each."""
        inner = torch.tanh(nn.functional.linear(self.rows, self.down, self.down_bias))
        both = nn.functional.linear(inner, self.up[layer], self.up_bias[layer])
        keys, values = both.to(dtype).view(self.tokens, 2, self.heads, -1).unbind(1)
        return keys, values

    @torch.no_grad()
    def projected(self) -> Prefix:
        """What it has become."""
        found = [self.before(layer, self.rows.dtype) for layer in range(len(self.up))]
        keys, values = (torch.stack(side) for side in zip(*found, strict=True))
        return Prefix(keys, values)


class Prompt(Soft):
    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.tokens = rows.shape[0]
        self.rows = nn.Parameter(rows)


def check_soft(decoder: Decoder, kind: type[Soft]) -> None:
    """Refuse a decoder that cannot have virtual tokens of this kind."""
    if decoder.memory != "pages":
        raise ConfigError(
            f"virtual tokens for a {decoder.family} model",
            rule="have no place: it keeps no keys and values token by token",
            next="set method to lora",
        )
    if kind is Prompt and decoder.config.prefix is not None:
        raise ConfigError(
            f"a trained prompt for a {decoder.family} model",
            rule="does not exist: its contexts see themselves whole",
            next="set method to prefix",
        )


def apply_soft(
    decoder: Decoder, kind: type[Soft], tokens: int, seed: int = 0, projection: int = 0
) -> Soft:
    """Freeze the decoder and put `tokens` virtual tokens before its documents. A prefix starts near
    zero, a prompt as rows of the embedding, drawn by the seed. projection: the inner width of the MLP
    that a prefix is trained through (0: none)."""
    check_soft(decoder, kind)
    digest = hashlib.sha256(f"soft/{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    c = decoder.requires_grad_(False).config
    soft: Soft
    if kind is Prefix and projection:
        soft = ProjectedPrefix(c, tokens, projection, generator).to(decoder.device)
    elif kind is Prefix:
        drawn = torch.empty(2, c.layers, tokens, c.kv_heads, c.head_dim)
        soft = Prefix(*drawn.normal_(0, SPREAD, generator=generator).to(decoder.device).unbind())
    else:
        ids = torch.randint(c.vocab, (tokens,), generator=generator)
        table: Any = decoder.embed
        soft = Prompt(table(ids.to(decoder.device)).detach().float().clone())
    decoder.soft = soft
    return soft
