"""A run that is killed, at whatever moment, and begun again ends in the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import raising
from raising import Printing, stock, tune

from herdbook.training import state


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path):
    book, _, _ = stock(tmp_path_factory.mktemp("reference"), tiny_folder)
    return tune().run(book)


def child(home: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, raising.__file__, str(home), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_at_several_moments(uninterrupted, tmp_path: Path, tiny_folder: Path):
    for packs in (1, 4, 9):  # within the first step, between two saves, later
        process = child(tmp_path, tiny_folder)
        assert process.stdout is not None
        for _ in range(packs):
            assert process.stdout.readline() == "pack\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    book, _, _ = stock(tmp_path, tiny_folder)
    (saved,) = book.home.rglob(state.NAME)  # something was there to go on from
    assert saved.is_file()
    resumed = tune().run(book)
    assert files(resumed.path) == files(uninterrupted.path)
    assert resumed.id == uninterrupted.id


def test_ctrl_c_saves_and_raises_on(uninterrupted, tmp_path: Path, tiny_folder: Path):
    class Interrupting(Printing):
        said: list[str] = []
        packs = 0

        def say(self, text: str) -> None:
            self.said.append(text)

        def task(self, name, **settings):
            outer = self

            class Line:
                def advance(self, amount, **notes):
                    outer.packs += 1
                    if outer.packs == 6:
                        signal.raise_signal(signal.SIGINT)

            from contextlib import nullcontext

            return nullcontext(Line())

    book, _, _ = stock(tmp_path, tiny_folder)
    handler = signal.getsignal(signal.SIGINT)
    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        tune().run(book, progress=progress)
    assert signal.getsignal(signal.SIGINT) == handler
    assert book.find("tune") is None
    resumed = tune().run(book, progress=progress)
    assert any(line.startswith("going on after step") for line in progress.said)
    assert files(resumed.path) == files(uninterrupted.path)


def test_another_run_s_state_is_not_continued(uninterrupted, tmp_path: Path, tiny_folder: Path):
    """The state names the rows and settings that it belongs to."""
    book, _, _ = stock(tmp_path, tiny_folder)
    process = child(tmp_path, tiny_folder)
    assert process.stdout is not None
    for _ in range(8):
        process.stdout.readline()
    process.kill()
    process.communicate()
    (left,) = book.home.rglob(state.NAME)
    other = tune(seed=1)
    work = book.home / "work" / other.resolved(book).key().removeprefix("sha256:")[:16]
    work.mkdir(parents=True)
    (work / state.NAME).write_bytes(left.read_bytes())
    foreign = other.run(book)
    assert foreign.metrics["steps"] == 10
    clean, _, _ = stock(tmp_path / "clean", tiny_folder)
    assert files(foreign.path) == files(other.run(clean).path)
