"""How several processes share the work of a step, so that it is the step that one would take.

    a step's rows ──packed once, as by one process──> packs ──dealt──> processes
    gradient = Σ over all packs of all processes / (trained tokens of the whole batch)

    ddp        each process holds the model; gradients are summed once a step
    fsdp       each holds a share of every weight, gradient and moment (torch's fully_shard)
    tp:2       two processes compute each pack together, with half of every matrix in the blocks;
               fsdp+tp:2, or tp:2 alone: the packs are dealt to the pairs
    pp:2       two processes hold half of the blocks each, and the packs go through both (torch's
               pipelining)

Nothing of what is learnt depends on how many there are: not which rows make a step, not how they are
packed, not a pack's dropout (seeded by its number). Only the order in which floating-point numbers
are added differs, so losses agree to about 1e-6 and weights are not the same bytes.

Why one sum a step, and not torch's DistributedDataParallel: that averages over processes inside the
last backward pass, so every process must have a pack left for it and the mean is not the mean of
tokens. Here a process may have more packs than another, or none: it adds up what it has, and the sum
of all sums is exactly the gradient of the batch. One step is many packs, so what overlapping would
save is small. Under fsdp weights are fetched block by block, by all at once: there each pack's turn
is everybody's, and who has none left computes one that does not count.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from herdbook.errors import ConfigError
from herdbook.tokens.packing import Pack

if TYPE_CHECKING:
    from herdbook.model.decoder import Decoder
    from herdbook.training.loop import Objective
    from herdbook.training.pipeline import Pipeline
    from herdbook.training.tune import Tune

#: bytes of gradients that are summed at once, in memory of their own
BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Split:
    """What is split: over the data's processes everything (`sharded`) or nothing but the packs; over
    `tensor` processes the blocks' matrices; over `stages` processes the blocks."""

    sharded: bool = False
    tensor: int = 1
    stages: int = 1

    @classmethod
    def read(cls, text: str) -> Split:
        """«ddp», «fsdp», «tp:2», «fsdp+tp:2», «pp:2»."""
        sharded, ways = False, {"tp": 1, "pp": 1}
        for part in text.split("+"):
            name, _, count = part.partition(":")
            if part == "fsdp":
                sharded = True
            elif name in ways and count.isdecimal() and int(count) > 0:
                ways[name] = int(count)
            elif part != "ddp":
                raise ConfigError(
                    f"tune.parallel is {text!r}",
                    rule="but its parts are ddp or fsdp, and tp:N or pp:N",
                    next="write ddp, fsdp, tp:2, fsdp+tp:2 or pp:2",
                )
        if ways["pp"] > 1 and (sharded or ways["tp"] > 1):
            raise ConfigError(
                f"tune.parallel is {text!r}",
                rule="but a pipeline goes with ddp alone",
                next=f"write pp:{ways['pp']}, or fsdp+tp:2",
            )
        return cls(sharded, ways["tp"], ways["pp"])

    @property
    def ways(self) -> int:
        """Processes that compute a pack together."""
        return self.tensor * self.stages


def check(how: Tune) -> None:
    """Refuse settings that cannot be."""
    split = Split.read(how.parallel)
    apart = split.sharded or split.ways > 1
    if apart and how.optimiser not in ("adamw", "lion"):
        raise ConfigError(
            f"tune.optimiser is {how.optimiser} and tune.parallel is {how.parallel}",
            rule="but it looks at whole matrices, of which each process has a share",
            next="set optimiser to adamw or lion, or parallel to ddp",
        )
    if (apart and how.precision == "bfloat16") or (split.ways > 1 and how.precision != "float32"):
        raise ConfigError(
            f"tune.precision is {how.precision} and tune.parallel is {how.parallel}",
            rule="which do not go together",
            next="set parallel to ddp, or precision to "
            + ("mixed (fsdp alone) or float32" if split.ways == 1 else "float32"),
        )
    if split.ways > 1:
        wrong = {
            "method": how.method not in ("lora", "freeze", "full"),
            "dropout": how.dropout > 0,
        }
        if split.tensor > 1:
            wrong |= {"base": how.base != "dense", "dora": how.dora, "group": how.group > 1}
        for name in (name for name, one in wrong.items() if one):
            raise ConfigError(
                f"tune.{name} is {getattr(how, name)} and tune.parallel is {how.parallel}",
                rule="which do not go together",
                next=f"set parallel to fsdp or ddp, or leave {name} out",
            )


@dataclass(frozen=True)
class Share:
    """A pack to compute here."""

    number: int  # among the step's packs
    pack: Pack
    counts: bool = True  # else it is computed to keep the others company


class Team:
    """The processes that take the steps together, as one of them sees it. One alone is a team too."""

    def __init__(self, how: str = "ddp") -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1
        split = Split.read(how)
        if self.size % split.ways:
            raise ConfigError(
                f"tune.parallel is {how} and there is {self.size} process"
                + ("es" if self.size > 1 else ""),
                rule=f"but a multiple of {split.ways} is needed",
                next=f"torchrun --nproc-per-node {split.ways} -m herdbook raise …",
            )
        self.tensor, self.stages = split.tensor, split.stages
        self.sharded = split.sharded and not self.alone
        #: how many computations of different packs there are, and which of them is here
        self.replicas = self.size // split.ways
        self.replica = self.rank // self.tensor % self.replicas
        self.mesh: Any = None
        #: parameters of which each process of a pair has a part of the gradient
        self.partial: list[nn.Parameter] = []
        #: all parameters that move, here or elsewhere
        self.moving: dict[str, nn.Parameter] = {}
        self.pipeline: Pipeline | None = None
        if not self.alone and (self.sharded or split.ways > 1):
            from torch.distributed.device_mesh import init_device_mesh

            kind = "cuda" if torch.cuda.is_available() else "cpu"
            sizes, names = (self.stages, self.replicas, self.tensor), ("stage", "data", "tensor")
            self.mesh = init_device_mesh(kind, sizes, mesh_dim_names=names)

    @property
    def leads(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def apart(self) -> bool:
        """Whether no process has all that is moved."""
        return self.mesh is not None

    def share(
        self, objective: Objective, decoder: Decoder, mixed: bool
    ) -> tuple[Objective, dict[str, nn.Parameter]]:
        """Split the model as planned: what to compute now, and the parameters that move."""
        if torch.cuda.is_available() and not self.alone:
            decoder.to("cuda")
        if self.apart:
            from herdbook.training import sharding

            if self.tensor > 1:
                self.partial = sharding.split_matrices(decoder, self.mesh["tensor"])
            if self.sharded:
                objective = sharding.Sharded(objective, decoder, self.mesh["data"], mixed)
        self.moving = {n: p for n, p in decoder.named_parameters() if p.requires_grad}
        if self.stages == 1:
            return objective, self.moving
        from herdbook.training.pipeline import Pipeline

        self.pipeline = Pipeline(objective, decoder, self.mesh["stage"].get_group())
        owns = self.pipeline.stage.owns
        return self.pipeline, {name: one for name, one in self.moving.items() if owns(name)}

    def gather(self, decoder: nn.Module) -> None:
        """The leader's decoder has all of its weights again; the others' have had their time."""
        if self.pipeline is not None:
            self.pipeline.gather(self.moving)
        elif self.apart:
            from herdbook.training import sharding

            sharding.gather(decoder, self.leads)

    def deal(self, packs: Sequence[Pack]) -> Iterator[Share]:
        """What of a step's packs is computed here."""
        if not self.sharded:
            for number in range(self.replica, len(packs), self.replicas):
                yield Share(number, packs[number])
            return
        kinds: dict[type, list[int]] = {}  # the kind says how often the blocks are computed
        for number, pack in enumerate(packs):
            kinds.setdefault(type(pack), []).append(number)
        for numbers in kinds.values():
            for turn in range(
                self.replica, -(-len(numbers) // self.replicas) * self.replicas, self.replicas
            ):
                number = numbers[turn % len(numbers)]
                yield Share(number, packs[number], counts=turn < len(numbers))

    def add_up(
        self, parameters: Mapping[str, nn.Parameter], loss: float, stop: bool
    ) -> tuple[float, bool]:
        """Make every gradient the sum of all processes'; the whole loss, and whether any is to stop."""
        if self.alone:
            return loss, stop
        moving = list(parameters.values())
        once = loss if self.rank % self.tensor == 0 else 0.0
        where = local(moving[0]).device
        sums = torch.tensor([once, stop], dtype=torch.float64, device=where)
        dist.all_reduce(sums)
        total, stops = sums.tolist()
        cut: list[Any] = [one for one in moving if hasattr(one, "placements")]
        for one in cut if self.tensor > 1 else []:  # what DTensor has left to be added up
            if one.grad is not None:
                one.grad = one.grad.redistribute(placements=one.placements)
        if not self.sharded:
            group = self.mesh["data"].get_group() if self.apart else None
            has = torch.tensor([one.grad is not None for one in moving], device=where).int()
            dist.all_reduce(has, group=group)
            # one that has no gradient anywhere has none afterwards, as in a single process
            for parameter, any_has in zip(moving, has.tolist(), strict=True):
                if any_has and parameter.grad is None:
                    kept = getattr(parameter, "grad_dtype", None)
                    parameter.grad = torch.zeros_like(parameter, dtype=kept)
            add([local(one.grad) for one in moving if one.grad is not None], group)
        parts = [local(one.grad) for one in self.partial if one.grad is not None]
        if parts:
            add(parts, self.mesh["tensor"].get_group())
        return total, stops > 0

    def norm(self, grads: Sequence[Tensor]) -> Tensor:
        """The joint norm of whole gradients, of which each process may have a share."""
        if not self.apart:
            return torch.nn.utils.get_total_norm(grads)
        total = torch.zeros((), dtype=torch.float64, device=local(grads[0]).device)
        # a tied embedding is the first stage's and the last one's: it counts once
        again = [] if self.pipeline is None else self.pipeline.again
        twice = {id(one.grad) for one in again}
        for grad in (one for one in grads if id(one) not in twice):
            copies = self.size / self.stages / _pieces(grad)
            total += local(grad).double().square().sum() / copies
        dist.all_reduce(total)
        return total.sqrt().float()

    @property
    def neighbours(self) -> int:
        """How many processes are on this one's machine, itself included."""
        return 1 if self.alone else int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def least(self, *numbers: int) -> list[int]:
        """Of each number the least that any process has."""
        if self.alone:
            return list(numbers)
        found = torch.tensor(numbers)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return found.tolist()

    def barrier(self) -> None:
        if not self.alone:
            dist.barrier()


def local(tensor: Any) -> Any:
    """The share of a tensor that is here, in the same memory; a whole one is its own share."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _pieces(tensor: Any) -> int:
    """How many different shares of it there are; every other process has a copy of one of them."""
    if not hasattr(tensor, "placements"):
        return 1
    mesh = tensor.device_mesh
    cut = (i for i, one in enumerate(tensor.placements) if not one.is_replicate())
    return math.prod(mesh.size(i) for i in cut)


def add(tensors: Iterable[Tensor], group: Any = None) -> None:
    """Make each the sum of all processes', many small ones in one message."""
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = buckets.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(one.nbytes for one in bucket) >= BUCKET_BYTES:
            _add(buckets.pop(tensor.dtype), group)
    for bucket in buckets.values():
        _add(bucket, group)


def _add(bucket: Sequence[Tensor], group: Any) -> None:
    flat = torch.cat([one.flatten() for one in bucket])
    dist.all_reduce(flat, group=group)
    parts = torch.split(flat, [one.numel() for one in bucket])
    for one, part in zip(bucket, parts, strict=True):
        one.copy_(part.view_as(one))
