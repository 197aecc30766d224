"""Rows of results on disk while a step is at work, so that a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from herdbook.progress import Progress


class Answered:
    """The rows of the batches that are done, in a file that grows by a batch at a time."""

    def __init__(self, path: Path, batches: Sequence[Sequence[Any]]) -> None:
        self.path, self.batches = path, batches
        self.rows: list[dict[str, Any]] = []
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        self.done, kept = 0, 0
        for batch in batches:  # a kill may have cut the last one
            if kept + len(batch) > len(lines):
                break
            self.done, kept = self.done + 1, kept + len(batch)
        self.rows = [json.loads(line) for line in lines[:kept]]
        with path.open("ab") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:kept]))

    def missing(self) -> Sequence[Sequence[Any]]:
        return self.batches[self.done :]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def fill(
        self, answer: Callable[[Any], list[dict[str, Any]]], progress: Progress, name: str
    ) -> list[dict[str, Any]]:
        """The rows of all batches; those that are missing are asked for, and kept as they come."""
        total = sum(map(len, self.batches))
        with progress.task(name, total=total, unit="questions", done=len(self.rows)) as bar:
            for batch in self.missing():
                self.add(answer(batch))
                bar.advance(len(batch))
        return self.rows
