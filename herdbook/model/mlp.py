"""What stands beside attention in a block: one MLP, or many of which a router chooses.

T tokens, E experts, K of them for each token, ffn inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from herdbook.model.config import DecoderConfig
from herdbook.model.fused import swiglu
from herdbook.model.layers import Linear
from herdbook.model.lora import together

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """down(activation(gate(x)) · up(x)), or without a gate down(activation(up(x)))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        self.gate = Linear(c.hidden, c.ffn, c.mlp_bias) if c.gated else None
        self.up = Linear(c.hidden, c.ffn, c.mlp_bias)
        self.down = Linear(c.ffn, c.hidden, c.mlp_bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            inner = self.activation(self.up(x))
        elif (both := together(x, self.gate, self.up)) is None:
            gate, up = self.gate(x), self.up(x)
            swish = self.activation is F.silu
            inner = swiglu(gate, up) if swish else self.activation(gate) * up
        elif self.activation is F.silu:
            inner = swiglu(both)
        else:
            gate, up = both.chunk(2, -1)
            inner = self.activation(gate) * up
        y: Tensor = self.down(inner)
        return y


class Experts(nn.Module):
    """A mixture: each token goes through the K experts that the router likes best, weighted by their
    renormalised chances. Jiang et al., "Mixtral of Experts", 2024 (arXiv:2401.04088).

    Computed expert by expert over all of its tokens at once, and dropless: an expert takes as many
    tokens as choose it. `plain` is the twin, token by token.

    `load` int64 [E]: how many tokens each expert got in the last call. `imbalance`, a scalar that
    training may add to its loss: E · Σₑ (share of choices of e) · (mean chance of e), which is K when
    the load is even (Shazeer et al., 2017; Fedus et al., "Switch Transformers", 2021).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        c = config
        self.used = c.experts_used
        self.router = Linear(c.hidden, c.experts)
        self.experts = nn.ModuleList(MLP(c) for _ in range(c.experts))
        self.load: Tensor | None = None
        self.imbalance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, hidden]."""
        weights, chosen = self.route(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            if len(tokens):
                part = expert(x[tokens]) * weights[tokens, place, None].to(x.dtype)
                out = out.index_add(0, tokens, part)
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 [T, K] that sum to 1, and which experts int64 [T, K]."""
        chances = self.router(x).float().softmax(-1)  # [T, E]
        weights, chosen = chances.topk(self.used, -1)
        self.load = torch.bincount(chosen.flatten(), minlength=len(self.experts))
        if self.training:
            share = self.load / len(x)
            self.imbalance = len(self.experts) * (share * chances.mean(0)).sum()
        return weights / weights.sum(-1, keepdim=True), chosen

    def plain(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        rows = []
        for token, of, which in zip(x, weights, chosen.tolist(), strict=True):
            outs = [w * self.experts[e](token[None])[0] for w, e in zip(of, which, strict=True)]
            rows.append(torch.stack(outs).sum(0))
        return torch.stack(rows).to(x.dtype)
