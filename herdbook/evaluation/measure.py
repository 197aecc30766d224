"""Size, speed and memory of a model, measured where nothing else has been loaded: in a process of
its own (``python -m herdbook.evaluation.measure MODEL`` prints one JSON line).

Prefill: 512 random tokens in, one out. Decode: what each further token takes. Each three times with
other tokens (else the prefix cache would answer), the median counts.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from herdbook.engine.loading import load
from herdbook.errors import HerdbookError
from herdbook.training.memory import peak_bytes

PREFILL, DECODE, REPEATS = 512, 64, 3


def size_bytes(path: Path) -> int:
    """On disk, all files of the model."""
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def measure(path: Path) -> dict[str, Any]:
    """{"size_bytes", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes", "load_s"}."""
    done = subprocess.run(
        [sys.executable, "-m", "herdbook.evaluation.measure", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HerdbookError(
            f"{path} could not be measured: {(done.stderr.strip() or 'killed').splitlines()[-1]}",
            next="try herd doctor; the machine may be out of memory",
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _here(path: Path) -> dict[str, Any]:
    """Measure in this process."""
    begun = time.perf_counter()
    model = load(str(path))
    load_s = time.perf_counter() - begun
    vocabulary = model.config.vocab
    prefill = min(PREFILL, model.config.max_pos // 2)
    decode = min(DECODE, model.config.max_pos // 4)

    def seconds(prompt: int, new: int, seed: int) -> float:
        dice = random.Random(f"{prompt} {new} {seed}")
        ids = [dice.randrange(vocabulary) for _ in range(prompt)]
        begun = time.perf_counter()
        model.generate(ids, max_tokens=new, ignore_eos=True)
        return time.perf_counter() - begun

    seconds(16, 4, -1)  # warm up: threads, packed weights
    prefills = [prefill / seconds(prefill, 1, n) for n in range(REPEATS)]
    decodes = [
        decode / max(seconds(16, decode + 1, n) - seconds(16, 1, n), 1e-9) for n in range(REPEATS)
    ]
    return {
        "size_bytes": size_bytes(path),
        "prefill_tokens_per_s": statistics.median(prefills),
        "decode_tokens_per_s": statistics.median(decodes),
        "peak_bytes": peak_bytes(),
        "load_s": load_s,
    }


if __name__ == "__main__":
    print(json.dumps(_here(Path(sys.argv[1]))))
