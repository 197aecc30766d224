"""RWKV-4: a recurrence in the place of attention, so a state of five vectors a layer is all it keeps.

T tokens, H hidden, A width of the attention, F inner width of the channel mixing; B documents of one
length L.

Both halves of a block see each token mixed with the one before it: mix(h, μ) = μ·h + (1 − μ)·h_prev.

    time mixing      r, k, v = Wr·mix, Wk·mix, Wv·mix;   x += Wo(σ(r) · wkv)
    channel mixing   r, k = Wr·mix, Wk·mix;              x += σ(r) · Wv(relu(k)²)

wkv is a mean of the values so far, channel by channel, weighted by e^k and by e^w a step back (w < 0);
the token itself counts with e^(u + k). Peng et al., "RWKV", 2023 (arXiv:2305.13048).

In our names time mixing is the block's `attention` (q is the receptance r), channel mixing its `mlp`
(gate is r, up is k, down is v), so adapters find them under the names they have everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from herdbook.model.carried import State, by_length
from herdbook.model.decoder import Decoder, Ropes
from herdbook.model.layers import LayerNorm, Linear, Vector, make_norm
from herdbook.model.layout import Layout, Packed
from herdbook.model.own_configs import RWKVConfig

#: tokens whose weights on one another are computed at once; the rest of the past is in the state
CHUNK = 8

#: numerator, denominator, and the exponent that both are scaled by: float32 [B, A] each
Memory = tuple[Tensor, Tensor, Tensor]


def shift(states: list[State] | None, x: Tensor, name: str) -> Tensor:
    """x [B, L, H] → each token's predecessor; of the first token the state's, or zero."""
    first = torch.zeros_like(x[:, :1])
    for number, state in enumerate(states or ()):
        if name in state:
            first[number] = state[name]
        state[name] = x[number, -1].clone()
    return torch.cat([first, x[:, :-1]], 1)


def wkv(
    decay: Tensor, first: Tensor, k: Tensor, v: Tensor, memory: Memory
) -> tuple[Tensor, Memory]:
    """w = decay, u = first [A]; k, v [B, L, A]; all float32 → [B, L, A] and the memory after them.

    A chunk at a time: within it every pair of tokens, before it the memory. A chunk of one token is
    the recurrence as it is written in papers. Weights are scaled by e^−q, q their greatest exponent,
    so nothing overflows; q cancels, so it needs no gradient.
    """
    a, b, p = memory
    parts = []
    for start in range(0, k.shape[1], CHUNK):
        keys, values = k[:, start : start + CHUNK], v[:, start : start + CHUNK]
        n = keys.shape[1]
        at = torch.arange(n, device=k.device)
        steps = (at[:, None] - at - 1)[..., None]  # decays of token j seen from token i: [n, n, 1]
        pairs = (keys[:, None] + steps * decay).masked_fill(steps < 0, float("-inf"))
        pairs = torch.where(steps == -1, (keys + first)[:, None], pairs)  # [B, n, n, A]
        past = p[:, None] + at[:, None] * decay  # [B, n, A]
        with torch.no_grad():
            q = torch.maximum(past, pairs.amax(2))
        near, far = torch.exp(pairs - q[:, :, None]), torch.exp(past - q)
        top = (near * values[:, None]).sum(2) + far * a[:, None]
        parts.append(top / (near.sum(2) + far * b[:, None]))

        ends, past = keys + (n - 1 - at)[:, None] * decay, p + n * decay
        with torch.no_grad():
            p = torch.maximum(past, ends.amax(1))
        near, far = torch.exp(ends - p[:, None]), torch.exp(past - p)
        a, b = (near * values).sum(1) + far * a, near.sum(1) + far * b
    return torch.cat(parts, 1), (a, b, p)


class TimeMixing(nn.Module):
    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__()
        c, self.layer = config, layer
        self.q = Linear(c.hidden, c.head_dim)
        self.k = Linear(c.hidden, c.head_dim)
        self.v = Linear(c.hidden, c.head_dim)
        self.o = Linear(c.head_dim, c.hidden)
        self.decay, self.first = Vector(c.head_dim), Vector(c.head_dim)
        self.mix_q, self.mix_k, self.mix_v = (Vector(1, 1, c.hidden) for _ in range(3))

    def forward(self, x: Tensor, layout: Packed) -> Tensor:
        """x [T, H] → [T, H]."""
        before = by_length(layout, lambda s, x: shift(s, x, f"{self.layer}.attention"), x)
        q, k, v = (
            linear(torch.lerp(before, x, mix.weight.flatten()))
            for linear, mix in ((self.q, self.mix_q), (self.k, self.mix_k), (self.v, self.mix_v))
        )
        mean = by_length(layout, self.recur, k.float(), v.float())
        y: Tensor = self.o(torch.sigmoid(q) * mean.to(q.dtype))
        return y

    def recur(self, states: list[State] | None, k: Tensor, v: Tensor) -> Tensor:
        """k, v [B, L, A] → wkv [B, L, A], the states moved on."""
        decay, first = -torch.exp(self.decay.weight.float()), self.first.weight.float()
        name = f"{self.layer}.wkv"
        nothing = k.new_zeros(k.shape[2])
        start = nothing, nothing, nothing - 1e30
        begun = [state.get(name, start) for state in states] if states else [start] * len(k)
        a, b, p = (torch.stack(one) for one in zip(*begun, strict=True))
        memory: Memory = (a, b, p)
        compute: Callable[..., tuple[Tensor, Memory]] = wkv
        if torch.is_grad_enabled():  # else the pairs of all chunks would be kept for the gradient
            compute = partial(checkpoint, wkv, use_reentrant=False, preserve_rng_state=False)
        y, memory = compute(decay, first, k, v, memory)
        for number, state in enumerate(states or ()):
            state[name] = tuple(one[number] for one in memory)  # of [B, A], which all B keep alive
        return y


class ChannelMixing(nn.Module):
    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__()
        c, self.layer = config, layer
        self.gate = Linear(c.hidden, c.hidden)
        self.up = Linear(c.hidden, c.ffn)
        self.down = Linear(c.ffn, c.hidden)
        self.mix_gate, self.mix_up = Vector(1, 1, c.hidden), Vector(1, 1, c.hidden)

    def forward(self, x: Tensor, layout: Packed) -> Tensor:
        """x [T, H] → [T, H]."""
        before = by_length(layout, lambda s, x: shift(s, x, f"{self.layer}.mlp"), x)
        gate = self.gate(torch.lerp(before, x, self.mix_gate.weight.flatten()))
        inner = self.up(torch.lerp(before, x, self.mix_up.weight.flatten()))
        y: Tensor = torch.sigmoid(gate) * self.down(torch.relu(inner).square())
        return y


class RWKVBlock(nn.Module):
    def __init__(self, config: RWKVConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = make_norm(config), make_norm(config)
        self.attention = TimeMixing(config, layer)
        self.mlp = ChannelMixing(config, layer)

    def forward(self, x: Tensor, ropes: Ropes, layout: Layout) -> Tensor:
        """x [T, H] → [T, H]; ropes: none here."""
        assert isinstance(layout, Packed)
        x = x + self.attention(self.attention_norm(x), layout)
        y: Tensor = x + self.mlp(self.mlp_norm(x), layout)
        return y


class RWKV(Decoder):
    """A decoder of such blocks; everything around them is as in any other."""

    memory = "state"

    def __init__(self, config: RWKVConfig, *, headless: bool = False) -> None:
        super().__init__(config, headless=headless)
        self.norm = LayerNorm(config.hidden, 1e-5)  # whatever the configuration says of the others

    def make_block(self, layer: int) -> nn.Module:
        assert isinstance(self.config, RWKVConfig)
        return RWKVBlock(self.config, layer)
