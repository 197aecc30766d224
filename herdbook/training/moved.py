"""What the optimiser moves, where the weights that multiply are bfloat16.

    float32   the weights themselves                             16 bytes a weight with AdamW
    mixed     a float32 twin of each; the model computes in its   18, and computes in bfloat16
              bfloat16 rounding
    bfloat16  the weights themselves, rounded stochastically      14

with gradients of float32 in all three, so that packs add up exactly. A step of AdamW is often below
half the distance of two neighbouring bfloat16 numbers (1/256 of the weight): rounded to the nearest,
such a weight never moves. Rounded up as often as the rest of the way says, it moves on average as it
should (Gupta et al., 2015, arXiv:1502.02551; for bfloat16 Zamirai et al., 2020, arXiv:2010.06192).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from herdbook.training.offload import Offload, one_by_one
from herdbook.training.parallel import local

PRECISIONS = ("float32", "mixed", "bfloat16")


class Moved:
    """parameters: of the model, by name; for mixed float32, and bfloat16 from then on until `finish`.

    `weights`: what the optimiser moves, under the same names; of a parameter that is shared out among
    processes the share that is here, in the same memory. So an optimiser knows whole tensors only,
    and must be one that looks at each number by itself.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], precision: str) -> None:
        assert precision in PRECISIONS, precision
        self.parameters, self.precision = parameters, precision
        self.weights = {name: _share(p) for name, p in parameters.items()}
        if precision == "mixed":
            self.weights = {name: nn.Parameter(p.data) for name, p in parameters.items()}
            self.show()
        if precision != "float32":
            for p in parameters.values():
                p.grad_dtype = torch.float32

    def show(self) -> None:
        """Let the model compute with what the weights are now."""
        if self.precision == "mixed":
            for name, p in self.parameters.items():
                p.data = self.weights[name].data.bfloat16()

    @torch.no_grad()
    def step(self, optimiser: torch.optim.Optimizer, offload: Offload | None = None) -> None:
        """One step of the optimiser with the gradients of the model, which are then none.

        offload: where its state lies, if not in memory."""
        if self.precision == "bfloat16":
            _step_rounded(optimiser, offload)
        else:
            for name, p in self.parameters.items():
                self.weights[name].grad = local(p.grad)
            if offload is None:
                optimiser.step()
            else:
                for p in one_by_one(optimiser):
                    optimiser.step()
                    offload.keep(optimiser.state[p])
            self.show()
        for p in (*self.parameters.values(), *self.weights.values()):
            p.grad = None

    def finish(self) -> None:
        """The model has the weights that were trained, in their own format."""
        if self.precision == "mixed":
            for name, p in self.parameters.items():
                p.grad_dtype = None
                p.data = self.weights[name].data


def _share(parameter: nn.Parameter) -> nn.Parameter:
    here = local(parameter)
    return parameter if here is parameter else nn.Parameter(here.detach())


def _step_rounded(optimiser: torch.optim.Optimizer, offload: Offload | None) -> None:
    """Matrix by matrix: made float32, moved, rounded back. The optimiser's state is float32."""
    for p in one_by_one(optimiser):
        narrow = p.data
        p.data = narrow.float()
        optimiser.step()
        p.data = narrow.copy_(stochastic(p.data))
        p.grad = None
        if offload is not None:
            offload.keep(optimiser.state[p])


def stochastic(x: Tensor) -> Tensor:
    """float32 → one of the two nearest bfloat16, the nearer one more often: on average x itself.

    A bfloat16 is the upper half of a float32; the lower half is the chance of the next one outwards.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()
