"""A model cut into stages, of which each process has one: torch's pipeline with one forward, one back.

    stage 0   F0 F1 F2    B0 F3 B1 ·  B2 ·  B3      F, B: a pack's way through a stage, and back
    stage 1      F0 F1 B0 F2 B1 F3 B2 ·  B3         (Narayanan et al., 2019, arXiv:1806.03377)

A stage is some neighbouring blocks, the first with the embedding, the last with the norm and the head.
All packs of a step go through as micro-batches of one length: shorter ones get a document of filling
behind theirs, which nobody sees and on which there is no loss.

Each process keeps the whole model in its memory, but computes, and has gradients and moments of, its
stage alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.stage import PipelineStage

from herdbook.errors import ConfigError
from herdbook.model.decoder import Block, Decoder
from herdbook.model.layout import Packed
from herdbook.model.mlp import Experts
from herdbook.tokens.packing import Pack
from herdbook.training.objective import AnchorPack, NextToken

FIRST = ("embed", "places", "project_in", "embed_norm")
LAST = ("norm", "project_out", "head")


class Stage(nn.Module):
    """Some blocks, and what is before the first and after the last of all."""

    def __init__(self, decoder: Decoder, number: int, stages: int) -> None:
        super().__init__()
        many = len(decoder.blocks)
        self.decoder, self.number, self.stages = decoder, number, stages
        self.first, self.last = many * number // stages, many * (number + 1) // stages
        self.layouts: list[Packed] = []  # of the step's packs

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """ids [T] or the hidden state [T, hidden] of the pack `turn` [1] → hidden state."""
        layout = self.layouts[int(turn)]
        if self.number == 0:
            x = self.decoder.start(x, layout)
        x = self.decoder.through(x, layout, self.first, self.last)
        return self.decoder.finish(x) if self.number == self.stages - 1 else x

    def owns(self, name: str) -> bool:
        """Whether a parameter is of this stage; a tied embedding is of the first and of the last."""
        room, _, rest = name.partition(".")
        if room == "blocks":
            return self.first <= int(rest.partition(".")[0]) < self.last
        tied = room == "embed" and self.decoder.head is None
        ends = self.number == self.stages - 1 and (room in LAST or tied)
        return (self.number == 0 and room in FIRST) or ends


class Pipeline:
    """An objective computed stage by stage. group: the processes of one pipeline."""

    def __init__(self, objective: Any, decoder: Decoder, group: Any) -> None:
        stages = dist.get_world_size(group)
        moving = {name for name, one in decoder.named_parameters() if one.requires_grad}
        plain = all(type(block) is Block for block in decoder.blocks)
        mixed = any(isinstance(one, Experts) for one in decoder.modules())
        if not plain or mixed or decoder.config.prefix is not None:
            raise ConfigError(
                f"a {decoder.family} model under pp",
                rule="is not cut: only plain decoders are",
                next="set parallel to fsdp or ddp",
            )
        if len(decoder.blocks) < stages:
            raise ConfigError(
                f"pp:{stages} and a model of {len(decoder.blocks)} blocks",
                rule="which are too few",
                next=f"take at most {len(decoder.blocks)} stages",
            )
        assert isinstance(objective, NextToken)
        self.objective, self.decoder, self.group = objective, decoder, group
        self.stage = Stage(decoder, dist.get_rank(group), stages)
        for number in range(stages):
            if not any(Stage(decoder, number, stages).owns(name) for name in moving):
                raise ConfigError(
                    f"pp:{stages} and nothing that moves in stage {number + 1}",
                    rule="so its processes would have nothing to do on the way back",
                    next="set parallel to ddp, or last_layers to 0",
                )
        self.ends = (0, stages - 1)
        #: moving parameters of both ends
        self.tied = [
            one
            for name, one in decoder.named_parameters()
            if name in moving and name.startswith("embed.") and decoder.head is None
        ]
        #: those that count in another stage
        self.again = self.tied if self.stage.number == stages - 1 else []

    def packs(self, rows: Sequence[Any], capacity: int) -> Sequence[Pack]:
        found = self.objective.packs(rows, capacity)
        if any(isinstance(one, AnchorPack) for one in found):
            raise ConfigError(
                "rows to keep under pp",
                rule="need the base's own answer, for which a pipeline has no way back",
                next="set parallel to fsdp or ddp",
            )
        return found

    def weight(self, pack: Pack) -> int:
        return self.objective.weight(pack)

    def loss(self, pack: Pack) -> Tensor:
        raise AssertionError("a pipeline takes all packs of a step at once")

    def accumulate(self, packs: Sequence[Pack], trained: int) -> float:
        """Add the packs' gradients, divided by `trained`; their summed loss in the last stage, else 0."""
        if not packs:
            return 0.0
        where, count = self.decoder.device, len(packs)
        size = max(len(one.ids) for one in packs)
        fill = [size - len(one.ids) for one in packs]
        self.stage.layouts = [
            Packed([*one.lengths, *([more] if more else [])], device=where)
            for one, more in zip(packs, fill, strict=True)
        ]
        ids = [[*one.ids, *[0] * more] for one, more in zip(packs, fill, strict=True)]
        hidden = torch.empty(
            size, self.decoder.config.hidden, dtype=self.decoder.dtype, device="meta"
        ).requires_grad_()
        flat = torch.tensor(ids, device=where).flatten()
        first, last = self.stage.number == 0, self.stage.number == self.stage.stages - 1
        stage = PipelineStage(
            self.stage,
            self.stage.number,
            self.stage.stages,
            where,
            input_args=flat[:size].to("meta") if first else hidden,
            output_args=hidden,
            group=self.group,
        )
        kind = Schedule1F1B if count >= self.stage.stages else ScheduleGPipe
        losses: list[Tensor] = []

        def loss(hidden: Tensor, turn: Tensor) -> Tensor:
            pack = packs[int(turn)]
            seen = hidden[: len(pack.ids)]
            layout = self.stage.layouts[int(turn)]
            return self.objective._loss(pack, layout, seen, seen) / trained

        schedule = kind(stage, count, loss_fn=loss, scale_grads=False)
        turns = torch.arange(count)
        given: tuple[Tensor, ...] = (flat,) if first else ()
        more: dict[str, Any] = {"target": turns, "losses": losses} if last else {}
        schedule.step(*given, turn=turns, return_outputs=False, **more)
        if self.tied and self.stage.number in self.ends:
            _add_ends(self.tied, self.group, self.ends)
        return float(sum(one.item() for one in losses)) * trained

    @torch.no_grad()
    def gather(self, moving: Mapping[str, nn.Parameter]) -> None:
        """Give every process the weights of all stages."""
        stages = [Stage(self.decoder, n, self.stage.stages) for n in range(self.stage.stages)]
        ranks = dist.get_process_group_ranks(self.group)
        for name, one in moving.items():
            owner = next(stage.number for stage in stages if stage.owns(name))
            dist.broadcast(one.data, ranks[owner], group=self.group)


def _add_ends(parameters: Sequence[nn.Parameter], group: Any, ends: tuple[int, int]) -> None:
    """Both ends of a pipeline have a part of these gradients: each gets the sum."""
    ranks = dist.get_process_group_ranks(group)
    here = dist.get_rank(group)
    other = ranks[ends[1] if here == ends[0] else ends[0]]
    for one in parameters:
        mine = torch.zeros_like(one) if one.grad is None else one.grad
        theirs = torch.empty_like(mine)
        work = [
            dist.P2POp(dist.isend, mine.contiguous(), other, group),
            dist.P2POp(dist.irecv, theirs, other, group),
        ]
        for waiting in dist.batch_isend_irecv(work):
            waiting.wait()
        one.grad = mine + theirs if here == ends[0] else theirs + mine
