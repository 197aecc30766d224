"""Progress of long work: a rich bar in a terminal, plain lines elsewhere, silence in tests.

    with progress.task("tune", total=120_000, unit="tokens") as task:
        task.advance(2_048, loss=1.93)

shows ``tune ━━━━━━ 41 % 312 tokens/s 0:03:12 left loss 1.93``. Everything goes to stderr, so that
stdout stays what a script asked for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    def advance(self, amount: float, **notes: float) -> None: ...


class Progress:
    """Says nothing. The base for the two that do, and the default of library calls."""

    def say(self, text: str) -> None:
        """One line for the user."""

    @contextmanager
    def task(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        """Work of `total` units of which `done` are there already (resumed)."""
        yield _Silent()


class _Silent:
    def advance(self, amount: float, **notes: float) -> None:
        pass


def _notes(notes: dict[str, float]) -> str:
    return " ".join(f"{key} {value:.4g}" for key, value in notes.items())


class _Line:
    """Plain progress: a line at the start, every `every_s` seconds, and at the end."""

    def __init__(self, name: str, total: float, unit: str, done: float, every_s: float) -> None:
        self.name, self.total, self.unit, self.every_s = name, total, unit, every_s
        self.done = self.done_at_start = done
        self.started = self.said = time.monotonic()
        self.notes: dict[str, float] = {}

    def advance(self, amount: float, **notes: float) -> None:
        self.done += amount
        self.notes.update(notes)
        if time.monotonic() - self.said >= self.every_s:
            self.print()

    def print(self) -> None:
        self.said = time.monotonic()
        seconds = max(self.said - self.started, 1e-9)
        speed = (self.done - self.done_at_start) / seconds
        left = (self.total - self.done) / speed if speed > 0 else 0.0
        print(
            f"  {self.name}: {self.done:,.0f}/{self.total:,.0f} {self.unit}, "
            f"{speed:,.0f} {self.unit}/s, {left:,.0f} s left {_notes(self.notes)}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


class PlainProgress(Progress):
    """For pipes, logs and CI: lines that can be read afterwards."""

    def __init__(self, every_s: float = 10.0) -> None:
        self.every_s = every_s

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        line = _Line(name, total, unit, done, self.every_s)
        yield line
        line.print()


class RichProgress(Progress):
    """For a terminal: a bar with speed and time left."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def task(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        from rich import progress as bars

        columns = (
            bars.TextColumn("  {task.description}"),
            bars.BarColumn(bar_width=28),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[speed]}"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[notes]}"),
        )
        started, start = time.monotonic(), done
        with bars.Progress(*columns, console=self.console) as bar:
            number = bar.add_task(name, total=total, speed="", notes="")
            bar.update(number, completed=done)

            class Bar:
                done = start

                def advance(self, amount: float, **notes: float) -> None:
                    self.done += amount
                    speed = (self.done - start) / max(time.monotonic() - started, 1e-9)
                    bar.update(number, completed=self.done, speed=f"{speed:,.0f} {unit}/s")
                    if notes:
                        bar.update(number, notes=_notes(notes))

            yield Bar()


def for_terminal() -> Progress:
    """The right progress for this process's stderr."""
    return RichProgress() if sys.stderr.isatty() else PlainProgress()
