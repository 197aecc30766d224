"""Two and four processes take the very steps that one takes, however they share the model.

Each number of processes is started once, for all of its cases.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from raising import tune
from several import all_tuned, going_on, launch, losses, stopped, tuned

from herdbook.book.book import Artifact
from herdbook.errors import CapacityError, ConfigError
from herdbook.training import fitting, memory, state
from herdbook.training.parallel import Split, Team
from herdbook.training.planning import Memory

SMALL = {"length": 32, "pack": 32, "steps": 3}  # four packs a step
LORA = SMALL | {"dropout": 0.0}
FULL = LORA | {"method": "full", "learning_rate": 1e-3}

TWO: dict[str, dict[str, Any]] = {
    "dropout": SMALL,
    "fsdp": FULL | {"parallel": "fsdp"},
    "tp": FULL | {"parallel": "tp:2"},
    "pp": FULL | {"parallel": "pp:2"},
}
FOUR: dict[str, dict[str, Any]] = {
    "full": FULL,
    "idle": FULL | {"pack": 512},  # one pack a step: three processes have none
    "fsdp lora": LORA | {"parallel": "fsdp", "pack": 64},  # a rank of 2: two have no share of A
}
CASES = TWO | FOUR


@pytest.fixture(scope="module", autouse=True)
def float32():
    """As on a machine without bfloat16: only so can sums in another order agree to 1e-5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("herdbook.training.tune.compute_dtype", lambda: torch.float32)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def one(home: Path, tiny_folder: Path) -> Mapping[str, Artifact]:
    """By a single process: cases that differ in `parallel` alone are one step, done once."""
    return {
        name: tuned(home / "one", tiny_folder, changes | {"parallel": "ddp"})
        for name, changes in CASES.items()
    }


@pytest.fixture(scope="module")
def many(home: Path, tiny_folder: Path) -> Mapping[str, Artifact]:
    two = launch(2, all_tuned, home / "two", tiny_folder, TWO)
    return two | launch(4, all_tuned, home / "four", tiny_folder, FOUR)


@pytest.mark.parametrize("case", CASES)
def test_the_same_losses(case: str, one: Mapping[str, Artifact], many: Mapping[str, Artifact]):
    assert many[case].metrics["processes"] == (2 if case in TWO else 4)
    assert losses(many[case]) == pytest.approx(losses(one[case]), abs=1e-5)
    assert many[case].key == one[case].key and many[case].config == one[case].config
    assert many[case].files.keys() == one[case].files.keys()


def test_a_run_goes_on_with_other_numbers_of_processes(
    home: Path, tiny_folder: Path, one: Mapping[str, Artifact]
):
    place, changes = home / "moving", FULL | {"steps": 6, "parallel": "fsdp"}
    launch(2, stopped, place, tiny_folder, changes, 4)
    assert len(list(place.rglob(state.FOLDERS))) == 1
    said = launch(4, stopped, place, tiny_folder, changes, 2)
    assert any(line.startswith("going on after step") for line in said)
    artifact, said = going_on(place, tiny_folder, changes)
    assert any(line.startswith("going on after step") for line in said)
    whole = tuned(home / "one", tiny_folder, changes)
    assert losses(artifact) == pytest.approx(losses(whole), abs=1e-5)


def test_a_process_that_dies_costs_the_steps_since_the_last_state(
    home: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    steps = []
    add_up = Team.add_up

    def dying(self: Team, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 4 and self.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return add_up(self, *arguments)

    changes = FULL | {"steps": 6}
    whole = tuned(home / "one", tiny_folder, changes)
    monkeypatch.setattr(Team, "add_up", dying)
    place = home / "dying"
    artifact, said = launch(2, going_on, place, tiny_folder, changes, restarts=1)
    assert "going on after step 2 of 6" in said
    assert losses(artifact) == pytest.approx(losses(whole), abs=1e-5)


def refused(home: Path, folder: Path) -> str:
    with pytest.raises(CapacityError) as caught:
        tuned(home, folder, FULL)
    return str(caught.value)


def test_what_fits_not_one_of_them_is_refused_by_all(
    home: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """They share what their machine has, and none waits for one that has left."""
    gigabyte = 10**9

    def free() -> int:
        return 1000 if dist.get_rank() == 1 else 64 * gigabyte

    monkeypatch.setattr(memory, "free_bytes", free)
    said = launch(2, refused, home / "poor", tiny_folder)
    assert "in each of 2 processes" in said and "for each" in said
    monkeypatch.setattr(memory, "free_bytes", lambda: 8 * gigabyte)
    monkeypatch.setattr(memory, "held_bytes", lambda: 0)
    monkeypatch.setattr(
        fitting, "memory_of", lambda *a, **more: Memory(0, 3 * gigabyte, 0, 0, 0, 0)
    )
    assert launch(2, tuned, home / "half", tiny_folder, FULL).metrics["processes"] == 2
    monkeypatch.setattr(
        fitting, "memory_of", lambda *a, **more: Memory(0, 5 * gigabyte, 0, 0, 0, 0)
    )
    monkeypatch.setattr(fitting, "nearest_fit", lambda *a: None)
    assert "and there are 4.0 GB for each" in launch(2, refused, home / "whole", tiny_folder)


def test_plans():
    assert Split.read("fsdp+tp:2") == Split(sharded=True, tensor=2)
    assert Split.read("ddp") == Split()
    assert Split.read("pp:2") == Split(stages=2)
    with pytest.raises(ConfigError, match="with ddp alone"):
        Split.read("fsdp+pp:2")
    with pytest.raises(ConfigError, match="ddp or fsdp, and tp:N or pp:N"):
        Split.read("tp:x")
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        Team("tp:2")
    for changes in ({"parallel": "fsdp", "optimiser": "adamw8"}, {"parallel": "tp:2"}):
        with pytest.raises(ConfigError, match=r"tune\.parallel is"):
            tune(**changes).check()  # the second has dropout
