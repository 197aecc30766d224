"""How several processes share the work of a step, so that it is the step that one would take.

    a step's rows ──packed once, as by one process──> packs ──dealt──> processes
    gradient = Σ over all packs of all processes / (trained tokens of the whole batch)

Nothing of what is learnt depends on how many there are: not which rows make a step, not how they are
packed, not a pack's dropout (seeded by its number). Only the order in which floating-point numbers
are added differs, so losses agree to about 1e-6 and weights are not the same bytes.

    ddp    each process holds the model; gradients are summed once a step

Why one sum a step, and not torch's DistributedDataParallel: that averages over processes inside the
last backward pass, so every process must have a pack left for it and the mean is not the mean of
tokens. Here a process may have more packs than another, or none: it adds up what it has, and the sum
of all sums is exactly the gradient of the batch. One step is many packs, so what overlapping would
save is small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from herdbook.errors import ConfigError
from herdbook.tokens.packing import Pack

#: bytes of gradients that are summed at once, in memory of their own
BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Share:
    """A pack to compute here."""

    number: int  # among the step's packs
    pack: Pack


def check(how: str) -> None:
    """Refuse a plan that is not known."""
    if how != "ddp":
        raise ConfigError(f"parallel is {how!r}", rule="and is not known", next="write ddp")


class Team:
    """The processes that take the steps together, as one of them sees it. One alone is a team too."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1

    @property
    def leads(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def deal(self, packs: Sequence[Pack]) -> Iterator[Share]:
        """What of a step's packs is computed here."""
        for number in range(self.rank, len(packs), self.size):
            yield Share(number, packs[number])

    def add_up(self, parameters: Iterable[nn.Parameter], *numbers: float) -> list[float]:
        """Make every gradient the sum of all processes'; the sums of some numbers beside it."""
        if self.alone:
            return list(numbers)
        parameters = list(parameters)
        has = [float(one.grad is not None) for one in parameters]
        where = parameters[0].device
        sums = torch.tensor([*numbers, *has], dtype=torch.float64, device=where)
        dist.all_reduce(sums)
        found = sums.tolist()
        # one that has no gradient anywhere has none afterwards, as in a single process
        for parameter, somewhere in zip(parameters, found[len(numbers) :], strict=True):
            if somewhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
        add([one.grad for one in parameters if one.grad is not None])
        return found[: len(numbers)]

    def barrier(self) -> None:
        if not self.alone:
            dist.barrier()


def add(tensors: Sequence[Tensor]) -> None:
    """Make each the sum of all processes', many small ones in one message."""
    bucket: list[Tensor] = []
    room = BUCKET_BYTES
    for number, tensor in enumerate(tensors):
        bucket.append(tensor)
        room -= tensor.nbytes
        last = number == len(tensors) - 1
        if last or room <= 0 or tensors[number + 1].dtype != tensor.dtype:
            flat = torch.cat([one.flatten() for one in bucket])
            dist.all_reduce(flat)
            parts = flat.split([one.numel() for one in bucket])
            for one, part in zip(bucket, parts, strict=True):
                one.copy_(part.view_as(one))
            bucket, room = [], BUCKET_BYTES
