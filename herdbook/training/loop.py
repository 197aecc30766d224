"""The one training loop: rows in, trained weights out, and a kill at any moment changes nothing.

    rows ──shuffle by (seed, epoch)──> batches of `batch` rows ──pack──> packs of ≤ `pack` tokens
    one step = all packs of a batch:  gradient of Σ loss / (trained tokens of the whole batch)

So a long answer counts as much in a batch of eight packs as in one of one: the weight is the
token's, not the pack's. The classic slip is to average each micro-batch first; then a token in a
short micro-batch counts for more.

What is learnt is the `Objective`'s business, which weights move the caller's (whatever of
`parameters` it hands in), who computes which pack the `Team`'s. Steps are numbered from 0; each
seeds the random numbers anew from (seed, step), and for each pack (dropout) from (seed, step, its
number), so nothing random has to be stored for a run to go on exactly, or hangs on who computes it.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from herdbook.errors import DataError
from herdbook.progress import Progress
from herdbook.tokens.chat import Rendering
from herdbook.tokens.packing import Pack
from herdbook.training import mixing
from herdbook.training import optimiser as optimisers
from herdbook.training import state as states
from herdbook.training.moved import Moved
from herdbook.training.offload import Offload
from herdbook.training.parallel import Team
from herdbook.training.rows import Rows
from herdbook.training.state import State


@dataclass(frozen=True)
class Plan:
    """How to train: `Tune` says what each of these means and holds the defaults."""

    batch: int
    epochs: int
    steps: int
    pack: int
    learning_rate: float
    schedule: str
    floor: float
    warmup_ratio: float
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    optimiser: str
    average: float
    precision: str
    seed: int
    save_every: int
    #: of a mixture: rows of each dataset, and how many of them an epoch takes
    sizes: tuple[int, ...] = ()
    mix: tuple[int, ...] = ()

    def total(self, rows: int) -> int:
        """Steps in all."""
        return self.steps or self.epochs * -(-rows // self.batch)


class Objective(Protocol):
    """What is learnt."""

    def packs(self, rows: Sequence[Rendering], capacity: int) -> Sequence[Pack]:
        """The rows of one step in packs of at most `capacity` tokens."""

    def weight(self, pack: Pack) -> int:
        """How much of the loss lies in this pack (trained tokens)."""

    def loss(self, pack: Pack) -> Tensor:
        """The summed loss of a pack, a scalar with a gradient."""


def order(rows: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: a shuffle that depends on nothing but (seed, epoch), cut in pieces.

    >>> order(5, 2, seed=0, epoch=0) == order(5, 2, seed=0, epoch=0) != order(5, 2, seed=0, epoch=1)
    True
    """
    numbers = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(numbers)
    return _cut(numbers, batch)


def _cut(numbers: list[int], batch: int) -> list[list[int]]:
    return [numbers[start : start + batch] for start in range(0, len(numbers), batch)]


def batches(plan: Plan, rows: int, done: int = 0) -> Iterator[list[int]]:
    """The row numbers of every step that is still to come, epoch after epoch."""
    per_epoch = -(-rows // plan.batch)
    epoch, cuts = -1, list[list[int]]()
    for step in range(done, plan.total(rows)):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            if plan.mix:
                cuts = _cut(mixing.epoch(plan.sizes, plan.mix, plan.seed, epoch), plan.batch)
            else:
                cuts = order(rows, plan.batch, plan.seed, epoch)
        yield cuts[step % per_epoch]


def train(
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Rendering],
    plan: Plan,
    work: Path,
    progress: Progress | None = None,
    team: Team | None = None,
    *,
    offload: bool = False,
) -> State:
    """Take all steps that are still to be taken; the state at the end, the parameters as they are then.

    work: folder for the state, the same for all processes of the team. offload: what the optimiser
    keeps lies on that folder's disk, and is the same. Ctrl-C and SIGTERM finish the pack at hand
    (several processes: the step), save, and raise on.
    """
    optimisers.check_schedule(plan.schedule)
    progress, team = progress or Progress(), team or Team()
    total = plan.total(len(rows))
    warmup = optimisers.warmup_steps(total, ratio=plan.warmup_ratio, steps=plan.warmup_steps)
    mark = fingerprint(rows, plan, team.moving or parameters)
    moved = Moved(parameters, "float32" if team.apart else plan.precision)
    optimiser = optimisers.make(
        plan.optimiser,
        moved.weights,
        learning_rate=plan.learning_rate,
        betas=plan.betas,
        weight_decay=plan.weight_decay,
    )
    shelf = Offload(work, moved.weights.values()) if offload else None
    state = states.load(work, moved, optimiser, mark, shelf)
    moved.show()
    if state.step:
        progress.say(f"going on after step {state.step} of {total}")

    sizes = sizes_of(rows)
    passed = sum(int(sizes[cut].sum()) for cut in _first(batches(plan, len(rows)), state.step))
    to_come = sum(int(sizes[cut].sum()) for cut in batches(plan, len(rows), state.step))
    saved_at = began_at = state.step
    interrupted = _Interrupt(progress)
    with (
        torch.random.fork_rng(devices=[]),
        progress.task("tune", total=passed + to_come, unit="tokens", done=passed) as bar,
        interrupted.listening(),
    ):
        for cut in batches(plan, len(rows), state.step):
            began = time.monotonic()
            torch.manual_seed(_seed(plan.seed, state.step))
            packs = objective.packs([rows[n] for n in cut], plan.pack)
            trained = sum(objective.weight(one) for one in packs)
            assert trained, "the check lets no row without a trained token pass"
            if state.step == began_at and len(packs) < team.replicas:
                progress.say(
                    f"a step has {len(packs)} of the {team.replicas} packs that could be computed at "
                    "once: lower pack or raise batch, and no process waits"
                )
            loss, tokens = 0.0, sum(len(one.ids) for one in packs)
            if team.pipeline is not None:
                loss = team.pipeline.accumulate([turn.pack for turn in team.deal(packs)], trained)
            for turn in team.deal(packs) if team.pipeline is None else ():
                torch.manual_seed(_seed(plan.seed, state.step, turn.number))
                part = objective.loss(turn.pack)
                torch.autograd.backward(part / trained if turn.counts else part * 0)
                if not turn.counts:
                    continue
                loss += part.item()
                if interrupted and team.alone:  # this step is only begun: it is taken again
                    if state.step > saved_at:
                        states.save(work, state, moved, optimiser, mark, team, shelf)
                    raise KeyboardInterrupt
                bar.advance(len(turn.pack.ids), loss=loss / trained)
                tokens -= len(turn.pack.ids)
            loss, stop = team.add_up(parameters, loss, bool(interrupted))
            if tokens:  # what the others computed
                bar.advance(tokens, loss=loss / trained)
            torch.manual_seed(_seed(plan.seed, state.step))
            share = optimisers.rate(
                state.step, total, schedule=plan.schedule, warmup=warmup, floor=plan.floor
            )
            for group in optimiser.param_groups:
                group["lr"] = plan.learning_rate * share
            norm = optimisers.clip(parameters.values(), plan.clip, team.norm)
            if not norm < float("inf"):  # also catches not-a-number
                raise DataError(
                    f"the gradient of step {state.step + 1} is {norm} (rows {_some(cut)})",
                    rule="so the weights would be lost",
                    next="lower learning_rate, or look at these rows",
                )
            moved.step(optimiser, shelf)
            if plan.average:
                optimisers.average(optimiser, plan.average, shelf)
            state.step += 1
            state.seconds += time.monotonic() - began
            state.records.append(
                {
                    "step": state.step,
                    "loss": loss / trained,
                    "tokens": trained,
                    "rate": plan.learning_rate * share,
                    "norm": norm,
                }
            )
            if state.step % plan.save_every == 0 or state.step == total or stop:
                states.save(work, state, moved, optimiser, mark, team, shelf)
                saved_at = state.step
            if stop and state.step < total:
                raise KeyboardInterrupt
    if plan.average:
        optimisers.take_average(optimiser)
    moved.finish()
    return state


def fingerprint(
    rows: Sequence[Rendering], plan: Plan, parameters: Mapping[str, nn.Parameter]
) -> str:
    """Hash of all that decides the steps, so that a state is never continued by another run."""
    seen = hashlib.sha256(json.dumps(asdict(plan), sort_keys=True).encode())
    for name, parameter in parameters.items():
        seen.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
    if isinstance(rows, Rows):
        seen.update(rows.fingerprint().encode())
    else:
        for row in rows:
            seen.update(repr((type(row).__name__, row.ids, row.mask)).encode())
    return seen.hexdigest()


def sizes_of(rows: Sequence[Rendering]) -> np.ndarray:
    """Tokens of each row, int64 [rows]; those of tables are not read for it."""
    return rows.sizes if isinstance(rows, Rows) else np.array([len(row.ids) for row in rows])


def _seed(*places: int) -> int:
    text = "/".join(map(str, places))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _first(cuts: Iterator[list[int]], count: int) -> list[list[int]]:
    return [cut for _, cut in zip(range(count), cuts, strict=False)]


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(n + 1) for n in sorted(numbers)[:10])
    return shown + (", …" if len(numbers) > 10 else "")


class _Interrupt:
    """Ctrl-C, and SIGTERM (a batch system, a machine that goes down), as a flag that is looked at
    between packs, so that they never cut a step in two.

    A second one does not wait.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seen = ""

    def __bool__(self) -> bool:
        return bool(self.seen)

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self.seen:
                raise KeyboardInterrupt
            self.seen = signal.Signals(number).name

        before = {one: signal.signal(one, note) for one in self.SIGNALS}
        try:
            yield
        except KeyboardInterrupt:
            self.progress.say(
                f"stopped by {self.seen or 'Ctrl-C'}; the same command, given again, goes on"
            )
            raise
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
