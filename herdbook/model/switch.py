"""Switch Transformers' mixture: each token goes to one expert, which takes only so many of a document.

T tokens, E experts.

The expert's output counts by its chance. Tokens of a document beyond `capacity` for one expert get
nothing from it (their residual goes on). When a document is decoded token by token, the tokens that
each expert has had are counted on, so it drops exactly those that it would drop in one pass.
Fedus et al., "Switch Transformers", 2021 (arXiv:2101.03961).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from herdbook.model.carried import State
from herdbook.model.config import DecoderConfig
from herdbook.model.layers import Linear
from herdbook.model.mlp import MLP


class Switch(nn.Module):
    def __init__(self, config: DecoderConfig, capacity: int, bias: bool, name: str) -> None:
        super().__init__()
        self.capacity, self.name = capacity, name
        self.router = Linear(config.hidden, config.experts, bias)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.experts))

    def forward(self, x: Tensor, documents: Sequence[tuple[slice, State | None]]) -> Tensor:
        """x [T, hidden] → [T, hidden]; documents: each one's rows, and its state where it has one."""
        bias = None if self.router.bias is None else self.router.bias.float()
        chances = nn.functional.linear(x.float(), self.router.weight.float(), bias).softmax(-1)
        chance, chosen = chances.max(-1)  # [T]
        kept = torch.cat([self._kept(chosen[rows], state) for rows, state in documents])
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens = ((chosen == number) & kept).nonzero()[:, 0]
            if len(tokens):
                part = expert(x[tokens]) * chance[tokens, None].to(x.dtype)
                out = out.index_add(0, tokens, part)
        return out

    def _kept(self, chosen: Tensor, state: State | None) -> Tensor:
        """Which tokens of a document find room: bool [n]."""
        taken = nn.functional.one_hot(chosen, len(self.experts))  # [n, E]
        before = state.get(self.name, 0) if state is not None else 0
        count = taken.cumsum(0) + before
        if state is not None:
            state[self.name] = count[-1]
        return count.gather(1, chosen[:, None])[:, 0] <= self.capacity
