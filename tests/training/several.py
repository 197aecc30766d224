"""Tuning the tiny model in several processes, started by torchrun's own agent (forked: torch is
imported once)."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401
from raising import Rows, stock, tune
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from herdbook.book.book import Artifact
from herdbook.progress import PlainProgress, Progress
from herdbook.training import processes


def launch(size: int, work: Callable[..., Any], *arguments: Any, restarts: int = 0) -> Any:
    """What `work` returns in the process that leads."""
    config = LaunchConfig(
        run_id="test",
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        max_restarts=restarts,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.05,
        local_addr="localhost",
    )
    return elastic_launch(config, _joined)(work, *arguments)[0]


def _joined(work: Callable[..., Any], *arguments: Any) -> Any:
    with processes.crew() as leads:
        return work(*arguments) if leads else None


def tuned(home: Path, folder: Path, changes: dict[str, Any]) -> Artifact:
    book, _, _ = stock(home, folder)
    if "kept" in changes.get("data", ()):
        Rows(rows=("where|here or there", "when|now"), keep=True).run(book, name="kept")
    return tune(**changes).run(book)


def all_tuned(home: Path, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Artifact]:
    """Each case in a book of its own."""
    return {name: tuned(home / name, folder, changes) for name, changes in cases.items()}


class Stopping(Progress):
    """Presses Ctrl-C in the leader after so many packs, and keeps what is said."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def task(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Any]:
        yield self

    def advance(self, amount: float, **notes: float) -> None:
        self.after -= 1
        if self.after == 0:
            signal.raise_signal(signal.SIGINT)


def stopped(home: Path, folder: Path, changes: dict[str, Any], after: int) -> list[str]:
    """Tune until Ctrl-C after so many of the leader's packs; what was said."""
    progress = Stopping(after)
    book, _, _ = stock(home, folder)
    with pytest.raises(KeyboardInterrupt):
        tune(**changes).run(book, progress=progress)
    return progress.said


def going_on(home: Path, folder: Path, changes: dict[str, Any]) -> tuple[Artifact, list[str]]:
    progress = Stopping(-1)
    book, _, _ = stock(home, folder)
    return tune(**changes).run(book, progress=progress), progress.said


def losses(artifact: Artifact) -> list[float]:
    lines = (artifact.path / "losses.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


#: of the program below
STEPS = 40

if __name__ == "__main__":  # HOME FOLDER: what torchrun starts
    with processes.crew() as leads:
        if leads:
            book, _, _ = stock(Path(sys.argv[1]), Path(sys.argv[2]))
            tune(parallel="fsdp", steps=STEPS).run(book, progress=PlainProgress())
