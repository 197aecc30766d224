"""A run that is killed, at whatever moment, and begun again ends in the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import raising
from raising import mixture, stock, tune
from safetensors import SafetensorError

from herdbook.book.book import Artifact, Book
from herdbook.errors import CapacityError, DataError
from herdbook.progress import Progress
from herdbook.training import state
from herdbook.training.objective import NextToken


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path):
    book, _, _ = stock(tmp_path_factory.mktemp("reference"), tiny_folder)
    return tune().run(book)


def kill_after(packs: int, home: Path, folder: Path, changes: dict[str, Any]) -> None:
    """Tune in a process of its own, and kill it while it goes on after so many packs."""
    process = subprocess.Popen(
        [sys.executable, raising.__file__, str(home), str(folder), json.dumps(changes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in this process
    )
    assert process.stdin is not None and process.stdout is not None
    for _ in range(packs):
        assert process.stdout.readline() == "pack\n"
        process.stdin.write("\n")
        process.stdin.flush()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("offload", [(), ("optimiser",)])
def test_killed_at_several_moments(
    uninterrupted, offload: tuple[Any, ...], tmp_path: Path, tiny_folder: Path
):
    for packs in (1, 3, 4):  # before anything is saved; between two saves; later
        kill_after(packs, tmp_path, tiny_folder, {"offload": offload})
    book, _, _ = stock(tmp_path, tiny_folder)
    (saved,) = book.home.rglob(state.NAME)  # something was there to go on from
    assert saved.is_file()
    resumed = tune(offload=offload).run(book)
    assert files(resumed.path) == files(uninterrupted.path)
    assert resumed.id == uninterrupted.id


def test_a_mixture_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path, tiny_folder: Path):
    book, _, _ = stock(tmp_path / "whole", tiny_folder)
    whole = tune(**mixture(book)).run(book)
    for packs in (3, 5):
        kill_after(packs, tmp_path / "cut", tiny_folder, {"mixture": True})
    book, _, _ = stock(tmp_path / "cut", tiny_folder)
    resumed = tune(**mixture(book)).run(book)
    assert files(resumed.path) == files(whole.path) and resumed.id == whole.id
    assert whole.metrics["rows"] == 25


class Interrupting(Progress):
    """Presses Ctrl-C after six packs, or sends another signal."""

    def __init__(self, number: signal.Signals = signal.SIGINT) -> None:
        self.number = number
        self.said: list[str] = []
        self.packs = 0

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def task(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Any]:
        yield self

    def advance(self, amount: float, **notes: float) -> None:
        self.packs += 1
        if self.packs == 6:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_ctrl_c_and_sigterm_save_and_raise_on(
    uninterrupted, number: signal.Signals, tmp_path: Path, tiny_folder: Path
):
    book, _, _ = stock(tmp_path, tiny_folder)
    handler = signal.getsignal(number)
    progress = Interrupting(number)
    with pytest.raises(KeyboardInterrupt):
        tune().run(book, progress=progress)
    assert signal.getsignal(number) == handler
    assert progress.said[-1].startswith(f"stopped by {number.name}; the same command")
    assert book.find("tune") is None
    resumed = tune().run(book, progress=progress)
    assert any(line.startswith("going on after step") for line in progress.said)
    assert files(resumed.path) == files(uninterrupted.path)


def goes_on(book: Book, whole: Artifact) -> None:
    """The run was stopped with its state on disk, nothing else left, and ends as if it had not been."""
    assert book.find("tune") is None
    (saved,) = book.home.rglob(state.NAME)
    assert [one for one in saved.parent.iterdir() if one.name.endswith(".tmp")] == []
    progress = Interrupting()
    progress.packs = 99
    resumed = tune().run(book, progress=progress)
    assert any(line.startswith("going on after step") for line in progress.said)
    assert files(resumed.path) == files(whole.path)


def test_a_gradient_that_is_no_number_ends_the_run_with_the_reason(
    uninterrupted, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    book, _, _ = stock(tmp_path, tiny_folder)
    right, calls = NextToken.loss, []

    def wrong(self: NextToken, pack: Any) -> Any:
        calls.append(pack)
        return right(self, pack) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(NextToken, "loss", wrong)
    with pytest.raises(DataError, match=r"the gradient of step \d is nan \(rows [\d, ]+\)"):
        tune().run(book)
    monkeypatch.undo()
    goes_on(book, uninterrupted)


@pytest.mark.parametrize("error", ["OSError", "SafetensorError"])
def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(
    uninterrupted, error: str, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    book, _, _ = stock(tmp_path, tiny_folder)
    right, values, calls, tensors = state.safetensors.write, state.as_bytes, [], []

    def write(path: Path, *more: Any) -> None:
        calls.append(path)
        right(path, *more)

    def full(tensor: Any) -> memoryview:
        tensors.append(len(calls))
        if tensors.count(3) < 2:
            return values(tensor)
        if error == "OSError":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(state.safetensors, "write", write)
    monkeypatch.setattr(state, "as_bytes", full)
    with pytest.raises(CapacityError, match=r"the disk is full(.|\n)*it goes on from there"):
        tune().run(book)
    monkeypatch.undo()
    goes_on(book, uninterrupted)


def test_another_run_s_state_is_not_continued(tmp_path: Path, tiny_folder: Path):
    """The state names the rows and settings that it belongs to."""
    book, _, _ = stock(tmp_path, tiny_folder)
    with pytest.raises(KeyboardInterrupt):
        tune().run(book, progress=Interrupting())
    (left,) = book.home.rglob(state.NAME)
    other = tune(seed=1)
    work = book.home / "work" / other.resolved(book).key().removeprefix("sha256:")[:16]
    work.mkdir(parents=True)
    (work / state.NAME).write_bytes(left.read_bytes())
    foreign = other.run(book)
    assert foreign.metrics["steps"] == 10
    clean, _, _ = stock(tmp_path / "clean", tiny_folder)
    assert files(foreign.path) == files(other.run(clean).path)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": "adamw8", "method": "full", "precision": "bfloat16", "average": 0.9},
        {"optimiser": "lion", "method": "full", "precision": "mixed", "schedule": "linear"},
        {"optimiser": "adafactor", "method": "full", "recompute": True},
        {"optimiser": "adamw8", "rank": 64, "base": "nf4", "recompute": True, "average": 0.5},
    ],
    ids=lambda changes: changes["optimiser"],
)
def test_every_optimiser_and_format_goes_on_to_the_same_bytes(
    changes: dict[str, Any], tmp_path: Path, tiny_folder: Path
):
    step = tune(learning_rate=1e-3, **changes)
    book, _, _ = stock(tmp_path / "whole", tiny_folder)
    whole = step.run(book)
    assert whole.metrics["loss"] < whole.metrics["first_loss"]
    book, _, _ = stock(tmp_path / "cut", tiny_folder)
    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        step.run(book, progress=progress)
    resumed = step.run(book, progress=progress)
    assert any(line.startswith("going on after step") for line in progress.said)
    assert files(resumed.path) == files(whole.path)
