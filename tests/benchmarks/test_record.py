"""The record of a benchmark: honest ratios, whole lines, and nobody else's text touched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import record
import side
from record import Claim, Recorder

SPEED = Claim("decode", "tokens/s", 90.0, 60.0, "llama.cpp Q4_0", "128 tokens out")
MEMORY = Claim("memory", "MiB", 400.0, 200.0, "llama.cpp Q4_0", "VmRSS", more_is_better=False)


def test_ratio_above_one_is_better_for_us_whatever_the_unit() -> None:
    assert SPEED.ratio == 1.5
    assert MEMORY.ratio == 0.5


def test_one_json_line_a_claim_with_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder("engine", {"processor": "some"})
    recorder.add(SPEED)
    recorder.add(MEMORY)
    lines = capsys.readouterr().out.splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first == {
        "claim": "decode",
        "unit": "tokens/s",
        "ours": 90.0,
        "peer": 60.0,
        "peer_name": "llama.cpp Q4_0",
        "ratio": 1.5,
        "conditions": {"how": "128 tokens out", "processor": "some"},
    }
    assert second["ratio"] == 0.5


def test_a_section_is_replaced_and_all_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    engine, tuning = Recorder("engine", {}), Recorder("tuning", {})
    engine.claims, tuning.claims = [SPEED], [MEMORY]
    engine.write(path)
    tuning.write(path)
    by_hand = (
        path.read_text().replace("# Benchmarks\n", "# Benchmarks\n\nBy hand: 表.\n") + "\nEnd.\n"
    )
    path.write_text(by_hand)

    engine.claims = [Claim("decode", "tokens/s", 30.0, 60.0, "llama.cpp Q4_0", "again")]
    engine.write(path)

    after = path.read_text()
    old_row = "| decode | tokens/s | 90.0 | 60.0 | llama.cpp Q4_0 | 1.50 |"
    new_row = "| decode | tokens/s | 30.0 | 60.0 | llama.cpp Q4_0 | 0.50 |"
    assert old_row in by_hand
    assert after == by_hand.replace(old_row, new_row).replace("128 tokens out", "again")
    assert "| memory | MiB | 400 | 200 |" in after

    engine.write(path)
    assert path.read_text() == after


def test_a_lost_marker_is_told_and_the_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    recorder = Recorder("engine", {})
    recorder.claims = [SPEED]
    recorder.write(path)
    _, end = record.markers("engine")
    broken = path.read_text().replace(end, "")
    path.write_text(broken)
    with pytest.raises(SystemExit, match=r"'engine' are not one pair\n  next: put back one line"):
        recorder.write(path)
    assert path.read_text() == broken


def test_conditions_name_machine_versions_and_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/engine.py", "--only", "a b"])
    monkeypatch.setattr("os.getloadavg", lambda: (64.0, 64.0, 64.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    found = record.conditions(("pytest",), dtype="float32")
    assert found["processor"] and found["threads"] == 2 and found["dtype"] == "float32"
    assert found["pytest"] == pytest.__version__
    assert found["command"] == "python benchmarks/engine.py --only 'a b'"
    assert "busy (load 64.0 on 2 cores)" in capsys.readouterr().err
    assert f"processor: {found['processor']}; " in record.table([SPEED], found)


CHILD = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import side

class Child:
    def add(self, a, b):
        print("noise of a library")
        return a + b
    def threads(self):
        import os
        return os.environ["OMP_NUM_THREADS"]

side.serve(Child())
"""


def test_a_side_answers_and_its_end_is_told(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    with side.Side(str(script), "child") as child:
        assert child.ask("add", a=[1], b=[2]) == [1, 2]
        assert child.ask("threads") == str(record.THREADS)
        with pytest.raises(SystemExit, match="child ended with code 1 at 'subtract'") as told:
            child.ask("subtract")
        assert "noise of a library" in str(told.value)
        assert "has no attribute 'subtract'" in str(told.value)
