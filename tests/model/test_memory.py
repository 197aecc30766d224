"""Loading holds the result, one tensor and a little more; `make large` shows it on 1 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)


def measure(layout: str, megabytes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.model.lean", layout, str(megabytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("layout", "megabytes"),
    [("safetensors", 200), ("converted", 200), ("bin", 50), ("bin-legacy", 50), ("meta", 50),
     ("gguf", 50)],
)  # fmt: skip
def test_peak_is_the_result_and_one_tensor(layout: str, megabytes: int) -> None:
    found = measure(layout, megabytes)
    assert abs(found["final_bytes"] / 1e6 - megabytes) <= 0.1 * megabytes
    assert found["peak_bytes"] > 0.8 * found["final_bytes"], "what is measured is the loading"
    assert found["peak_bytes"] <= 1.05 * found["final_bytes"] + found["largest_bytes"]
