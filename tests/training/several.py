"""Tuning the tiny model in several processes, started by torchrun's own agent (forked: torch is
imported once)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raising import stock, tune
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from herdbook.book.book import Artifact
from herdbook.training import processes


def launch(size: int, work: Callable[..., Any], *arguments: Any, restarts: int = 0) -> Any:
    """What `work` returns in the process that leads."""
    config = LaunchConfig(
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
    return tune(**changes).run(book)


def losses(artifact: Artifact) -> list[float]:
    lines = (artifact.path / "losses.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
