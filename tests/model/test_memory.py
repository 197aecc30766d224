"""Loading holds the result, one tensor and a little more; `make large` shows it on 1 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.model.lean import LAYOUTS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)


def measure(**megabytes: int) -> list[dict[str, Any]]:
    """Layout → size; what loading each took, in a process of its own."""
    what = [f"{name.replace('_', '-')}:{size}" for name, size in megabytes.items()]
    command = [sys.executable, "-m", "tests.model.lean", *what]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: dict[str, Any]) -> None:
    assert found["peak_bytes"] > 0.8 * found["final_bytes"], "what is measured is the loading"
    assert found["peak_bytes"] <= 1.05 * found["final_bytes"] + found["largest_bytes"], found


def test_peak_is_the_result_and_one_tensor() -> None:
    sizes = {"safetensors": 200, "converted": 50, "bin": 50, "bin_legacy": 50}
    sizes |= {"meta": 50, "gguf": 50, "compressed": 50}
    found = measure(**sizes)
    assert [one["layout"] for one in found] == list(LAYOUTS)
    for one, megabytes in zip(found, sizes.values(), strict=True):
        assert abs(one["final_bytes"] / 1e6 - megabytes) <= 0.1 * megabytes
        check(one)
