"""The whole way, on a tiny model: every step, then kill -9 at several moments, then nothing to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from herdbook.book.book import Book

SETTINGS = (
    "--identity.rows=12", "--retention.rows=6", "--retention.max_tokens=4", "--tune.steps=12",
    "--tune.batch=3", "--tune.save_every=1", "--tune.last_layers=2", "--tune.rank=2",
    "--tune.length=512", "--report.min_identity=0", "--report.max_perplexity_increase=0", "--json",
)  # fmt: skip


def herd(home: Path, base: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "herdbook.cli", "raise", "cria", f"--base={base}"]
    return subprocess.Popen(
        [*command, *SETTINGS, *more],
        env={**os.environ, "HERDBOOK_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return dict(json.loads(out))


def weights(home: Path) -> dict[str, str]:
    """File hashes of what was learnt and what is served, and their ids."""
    found = {}
    for name in ("cria-tune", "cria-merge", "cria"):
        artifact = Book(home).get(name)
        found |= {f"{name}/{file}": hash for file, hash in artifact.files.items()}
        found[name] = artifact.id
    return found


def test_raised_killed_and_raised_again(tiny_folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    raised = finished(herd(whole, tiny_folder))
    assert raised["result"]["ref"] == "cria@1"
    assert len(raised["made"]) == 9 and raised["kept"] == []
    assert {"cria-tune-report@1", "cria-merge-report@1"} < set(raised["made"])
    (report,) = raised["reports"].values()
    assert report["verdict"] == "passed" and report["perplexity_en"] > 1
    checked, problems = Book(whole).verify("cria")
    assert len(checked) == 6 and problems == []

    again = finished(herd(whole, tiny_folder))
    assert again["made"] == [] and len(again["kept"]) == 7
    redone = finished(herd(whole, tiny_folder, "--int4.format=Q8_0"))
    assert redone["made"] == ["cria@2", "cria-report@2"]

    killed = tmp_path / "killed"
    moments = (  # what there is to be seen when the signal comes
        lambda: any((killed / "work").glob("*/answers-*")),
        lambda: any((killed / "work").glob("*/state*")),
        lambda: any((killed / "artifacts" / "adapter").glob("*")),
    )
    for moment in moments:
        process = herd(killed, tiny_folder)
        while process.poll() is None and not moment():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finished(herd(killed, tiny_folder))
    assert Book(killed).verify()[1] == []
    first = {name: id for name, id in weights(whole).items() if not name.startswith("cria/")}
    second = {name: id for name, id in weights(killed).items() if not name.startswith("cria/")}
    first.pop("cria"), second.pop("cria")  # the second there is Q8_0
    assert first == second
    assert Book(whole).get("cria@1").id == Book(killed).get("cria").id
