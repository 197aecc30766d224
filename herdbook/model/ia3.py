"""IA3: a frozen linear layer whose inputs or outputs are scaled, each by a trained factor.

    y = f ⊙ (x Wᵀ + b)   f [O]      keys and values
    y = (f ⊙ x) Wᵀ + b   f [I]      what the MLP's last matrix reads

Factors start at one. A llama of 7 billion weights trains 0.6 million of them. Merged, a factor is in
its row, or its column, of W. Liu et al., "(IA)³", 2022 (arXiv:2205.05638).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from herdbook.model.lora import Adapter, matrices, replace

#: what the paper scales
TARGETS = ("k", "v", "down")


class IA3Linear(Adapter):
    """A frozen linear layer and its factors: of its inputs, or of its outputs."""

    def __init__(self, base: nn.Module, inputs: bool) -> None:
        super().__init__()
        weight = base.weight
        assert isinstance(weight, Tensor) and weight.ndim == 2, "an adapter needs a dense matrix"
        self.outputs, self.inputs = weight.shape
        self.base, self.of_inputs = base.requires_grad_(False), inputs
        exact = torch.promote_types(weight.dtype, torch.float32)
        size = self.inputs if inputs else self.outputs
        self.factor = nn.Parameter(torch.ones(size, dtype=exact, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O]"""
        if self.bypassed:
            y: Tensor = self.base(x)
        elif self.of_inputs:
            y = self.base(x * self.factor.to(x.dtype))
        else:
            y = self.base(x) * self.factor.to(x.dtype)
        return y

    @torch.no_grad()
    def merge(self) -> nn.Module:
        weight, bias = self.base.weight, self.base.bias
        assert isinstance(weight, Tensor)
        factor = self.factor if self.of_inputs else self.factor[:, None]
        weight.copy_((weight.to(factor.dtype) * factor).to(weight.dtype))
        if isinstance(bias, Tensor) and not self.of_inputs:
            bias.mul_(self.factor.to(bias.dtype))
        return self.base


def apply_ia3(
    decoder: nn.Module, *, targets: tuple[str, ...] = TARGETS, last_layers: int = 0
) -> dict[str, IA3Linear]:
    """Freeze the decoder and put factors on `targets`, in so many of the last blocks (0: all)."""
    decoder.requires_grad_(False)
    names = matrices(decoder, targets, last_layers)
    return {name: put_factors(decoder, name, name.endswith(".down")) for name in names}


def put_factors(decoder: nn.Module, name: str, inputs: bool) -> IA3Linear:
    """Replace the linear layer of that name by itself with factors of one."""
    layer = IA3Linear(decoder.get_submodule(name), inputs)
    replace(decoder, name, layer)
    return layer
