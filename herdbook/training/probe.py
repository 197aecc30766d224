"""A short trial of a tuning run, in a process of its own: what it takes, in memory and in time.

    python -m herdbook.training.probe < question.json      one JSON line comes back

The model is loaded and given what is trained, and three packs go there and back: one to warm up with a
step of the optimiser, a short one and the fullest one, with another step. So at the end everything that
a run holds at its fullest moment has been held, and two packs of different size say what a pack costs
besides its arithmetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from herdbook import config
from herdbook.errors import CapacityError
from herdbook.tokens.packing import Pack

if TYPE_CHECKING:
    from herdbook.training.tune import Tune


@dataclass(frozen=True)
class Spent:
    """Seconds, by the clock and by the processor's own account: the latter does not wait for others."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Trial:
    peak: int  # bytes, the whole process
    load: Spent
    short: Spent
    full: Spent
    step: Spent


def probe(how: Tune, path: Path, work: Path, short: Pack, full: Pack, several: bool) -> Trial:
    """path: of the model; work: a folder on the run's disk; short, full: packs of the run. several:
    gradients wait for further packs."""
    question = {
        "settings": config.to_mapping(how),
        "path": str(path),
        "work": str(work),
        "packs": [[type(one).__name__, asdict(one)] for one in (short, full)],
        "several": several,
    }
    with tempfile.TemporaryFile("w+") as log:
        ran = subprocess.run(
            [sys.executable, "-m", "herdbook.training.probe"],
            check=False,
            input=json.dumps(question),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "HERDBOOK_FIT": "0"},
        )
        if ran.returncode:
            log.seek(0)
            raise CapacityError(
                f"a trial of three packs ended with code {ran.returncode}: {log.read()[-300:].strip()}",
                rule="so the run would end so too",
                next="--no-probe plans by arithmetic alone",
            )
    answer = json.loads(ran.stdout.splitlines()[-1])
    spent = {name: Spent(*answer[name]) for name in ("load", "short", "full", "step")}
    return Trial(peak=answer["peak"], **spent)


class _Watch:
    """Times of pieces of work, one after another."""

    def __init__(self) -> None:
        self.lap()

    def lap(self) -> tuple[float, float]:
        now = time.monotonic(), time.process_time()
        since = getattr(self, "now", now)
        self.now = now
        return now[0] - since[0], now[1] - since[1]


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    """The child's part: what `Tune.make` and the loop do, three packs long."""
    import torch

    from herdbook.training import memory, methods, planning
    from herdbook.training import optimiser as optimisers
    from herdbook.training.moved import Moved
    from herdbook.training.objective import AnchorPack, NextToken
    from herdbook.training.offload import Offload
    from herdbook.training.tune import Tune

    settings = config.from_mapping(Tune, question["settings"], where="the trial")
    found: dict[str, Any] = {}
    watch = _Watch()
    with memory.Peak() as peak:
        source: Any = SimpleNamespace(path=Path(question["path"]), ref=question["path"])
        decoder = settings._load(source, planning.dtype_of(settings))
        parameters = methods.prepare(decoder, settings)
        moved = Moved(parameters, settings.precision)
        optimiser = optimisers.make(
            settings.optimiser,
            moved.weights,
            learning_rate=0.0,
            betas=settings.betas,
            weight_decay=0.0,
        )
        away = "optimiser" in settings.offload
        shelf = Offload(Path(question["work"]), moved.weights.values()) if away else None
        moved.show()
        objective = NextToken(decoder, settings.anchor, settings.balance)
        found["load"] = watch.lap()

        def learn(pack: Pack) -> None:
            torch.autograd.backward(objective.loss(pack) / max(1, objective.weight(pack)))

        def step() -> None:
            optimisers.clip(parameters.values(), settings.clip)
            moved.step(optimiser, shelf)
            if settings.average:
                optimisers.average(optimiser, settings.average, shelf)

        kinds = {"Pack": Pack, "AnchorPack": AnchorPack}
        short, full = (kinds[kind](**one) for kind, one in question["packs"])
        learn(short)
        step()
        for name, pack in (("short", short), ("full", full)):
            watch.lap()
            learn(pack)
            found[name] = watch.lap()
            if name == "short" and not question["several"]:
                for one in parameters.values():
                    one.grad = None
        watch.lap()
        step()
        found["step"] = watch.lap()
    return {**found, "peak": peak.bytes}


def packs_of(rows: Sequence[Any], how: Tune, decoder: Any) -> list[list[Pack]]:
    """All packs of all steps, as the loop will take them. decoder: laid out on the meta device."""
    from herdbook.training import loop
    from herdbook.training.objective import NextToken

    objective, plan = NextToken(decoder, how.anchor), how._plan(rows, decoder.parameter_count())
    cuts = loop.batches(plan, len(rows))
    return [objective.packs([rows[n] for n in cut], plan.pack) for cut in cuts]


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
