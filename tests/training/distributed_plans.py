"""What `make distributed` runs: the plans' combinations on four processes, and torchrun itself with a
process killed from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import several
import torch
from several import all_tuned, launch, losses, tuned

from herdbook.book.book import Book
from herdbook.training import state

SMALL: dict[str, Any] = {"dropout": 0.0, "length": 32, "pack": 32, "steps": 3}
FULL = SMALL | {"method": "full", "learning_rate": 1e-3}
CASES: dict[str, dict[str, Any]] = {
    "fsdp+tp": FULL | {"parallel": "fsdp+tp:2"},
    "ddp+tp lora": SMALL | {"parallel": "tp:2"},
    "ddp+pp": FULL | {"parallel": "pp:2"},
    "ddp+pp dora": SMALL | {"parallel": "pp:2", "dora": True},
    "fsdp+tp lora": SMALL | {"parallel": "fsdp+tp:2"},
    "ddp+tp": FULL | {"parallel": "tp:2", "optimiser": "lion", "learning_rate": 1e-4},
    "fsdp recompute": FULL | {"parallel": "fsdp", "recompute": True, "average": 0.5},
    "fsdp dropout": SMALL | {"parallel": "fsdp", "dropout": 0.1, "dora": True},
    "fsdp whole": SMALL | {"parallel": "fsdp", "whole": ("embed",), "last_layers": 1},
    "fsdp kept": SMALL | {"parallel": "fsdp", "data": ("rows", "kept")},
    "fsdp prefix": SMALL | {"parallel": "fsdp", "method": "prefix", "virtual_tokens": 3},
    "ddp adamw8": FULL | {"optimiser": "adamw8", "precision": "bfloat16"},
    "ddp adafactor": FULL | {"optimiser": "adafactor", "pack": 512},
}


@pytest.fixture(scope="module", autouse=True)
def float32():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("herdbook.training.tune.compute_dtype", lambda: torch.float32)
        yield


def test_every_combination_gives_the_same_losses(tmp_path: Path, tiny_folder: Path):
    many = launch(4, all_tuned, tmp_path / "four", tiny_folder, CASES)
    worst = {}
    for name, changes in CASES.items():
        one = tuned(tmp_path / "one", tiny_folder, changes | {"parallel": "ddp"})
        apart = zip(losses(many[name]), losses(one), strict=True)
        worst[name] = max(abs(ours - theirs) for ours, theirs in apart)
    print(worst)
    narrow = worst.pop("ddp adamw8")  # rounded to bfloat16 after each step
    assert narrow < 1e-2 and max(worst.values()) < 1e-5, worst


def test_torchrun_goes_on_after_a_kill(tmp_path: Path, tiny_folder: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [several.__file__, str(tmp_path), str(tiny_folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    agent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert agent.stderr is not None
    while not list(tmp_path.glob(f"work/*/{state.FOLDERS}")):
        assert agent.poll() is None, agent.stderr.read()
        time.sleep(0.01)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, told = agent.communicate()
    assert agent.returncode == 0, told
    assert "going on after step" in told
    (made,) = (one for one in Book(tmp_path).entries() if one.step == "Tune")
    assert len(losses(made)) == several.STEPS
