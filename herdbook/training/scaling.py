"""How large a model, on how many tokens, a budget of arithmetic is best spent on.

Hoffmann et al., "Training Compute-Optimal Large Language Models" (Chinchilla), 2022, arXiv:2203.15556:
size and tokens grow alike, about 20 tokens a weight, and training costs 6 · weights · tokens. Cerebras-
GPT (Dey et al., 2023, arXiv:2304.03208) is a ladder of seven models built by that rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TOKENS_A_WEIGHT = 20
LADDER = {
    "111M": 111e6, "256M": 256e6, "590M": 590e6, "1.3B": 1.3e9, "2.7B": 2.7e9, "6.7B": 6.7e9,
    "13B": 13e9,
}  # fmt: skip


@dataclass(frozen=True)
class Optimum:
    weights: float
    tokens: float

    @property
    def flops(self) -> float:
        return 6 * self.weights * self.tokens

    @property
    def rung(self) -> str:
        """The model of Cerebras-GPT's ladder that is nearest in size."""
        return min(LADDER, key=lambda name: abs(math.log(LADDER[name] / self.weights)))


def for_budget(flops: float) -> Optimum:
    return for_size(math.sqrt(flops / (6 * TOKENS_A_WEIGHT)))


def for_size(weights: float) -> Optimum:
    return Optimum(weights, TOKENS_A_WEIGHT * weights)
