"""What `herd plan` says of ten configurations, and what they then take.

    python benchmarks/planning.py                  writes the table into docs/planning.md and .zh.md
    python benchmarks/planning.py --only lora,full --out found.json     writes no document

SmolLM2-135M on rows of Stanford Alpaca. Each configuration: a process plans it (arithmetic, then the
trial), and right after it another one runs it, the step Tune as it is, and tells its peak of resident
memory and the seconds of its steps. Beside the clock's seconds stand the processor's own, one thread:
where others use the machine too they are the steadier measure. Results are kept as they come (--out),
and a configuration that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FULL = {"method": "full", "learning_rate": 2e-5, "batch": 4}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, pack 512": {"pack": 512},
    "lora, recompute": {"recompute": True},
    "qlora (nf4)": {"base": "nf4"},
    "lora, packaged": {"base": "packaged"},
    "prefix": {"method": "prefix"},
    "freeze, 5 blocks": {"method": "freeze", "last_layers": 5, "batch": 4},
    "full": FULL,
    "full, mixed": {**FULL, "precision": "mixed"},
    "full, bfloat16, adamw8": {**FULL, "precision": "bfloat16", "optimiser": "adamw8"},
}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
HEADS = {
    "planning.md": ("configuration", "memory, MB: arithmetic", "trial", "measured",
                    "seconds of the processor: planned", "measured", "of the clock: planned", "measured"),
    "planning.zh.md": ("配置", "内存（MB）：推算", "试跑", "实测", "处理器秒数：预计", "实测", "钟表秒数：预计", "实测"),
}  # fmt: skip


def plan(settings: dict[str, Any], rows: str) -> dict[str, Any]:
    """The child that plans."""
    from herdbook import planned
    from herdbook.book.book import Book

    with tempfile.TemporaryDirectory() as home:
        given = {"model": "smollm2", "data": (rows,), **settings}
        (found,) = planned.plan_tune(given, Book(Path(home)), room=None, trial=True)
    return {
        "arithmetic": found.memory.peak,
        "trial": found.trial.peak if found.trial else 0,
        "wall": found.seconds,
        "cpu": found.cpu_seconds,
    }


def run(settings: dict[str, Any], rows: str) -> dict[str, Any]:
    """The child that runs it."""
    from herdbook.book.book import Book
    from herdbook.data.user import Import
    from herdbook.model.fetch import Fetch
    from herdbook.training import tune

    spent: list[float] = []
    train = tune.loop.train

    def timed(*args: Any) -> Any:
        began = time.process_time()
        state = train(*args)
        spent.append(time.process_time() - began)
        return state

    tune.loop.train = timed
    with tempfile.TemporaryDirectory() as home:
        book = Book(Path(home))
        model = Fetch(ref="smollm2").run(book)
        data = Import(data=rows, heldout=0.0).run(book, name="rows")
        made = tune.Tune(model=model.id, data=(data.id,), **settings).run(book)
    return {
        "peak": made.metrics["peak_memory_bytes"],
        "wall": made.metrics["seconds"],
        "cpu": spent[0],
    }


def child(what: str, settings: dict[str, Any], rows: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", what, json.dumps(settings), str(rows)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, Any], heads: Sequence[str]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, (said, was) in found.items():
        cells = [name]
        for key in ("arithmetic", "trial"):
            cells.append(f"{said[key] / 1e6:,.0f} ({said[key] / was['peak'] - 1:+.0%})")
        cells.append(f"{was['peak'] / 1e6:,.0f}")
        for clock in ("cpu", "wall"):
            cells.append(f"{said[clock]:.1f} ({said[clock] / was[clock] - 1:+.0%})")
            cells.append(f"{was[clock]:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3)
    given = parser.parse_args()
    if given.child:
        what, settings, rows = given.child
        print(json.dumps({"plan": plan, "run": run}[what](json.loads(settings), rows)))
        return
    from side import data_folder

    found: dict[str, Any] = {}
    if given.out and given.out.exists():
        found = json.loads(given.out.read_text())
    with tempfile.TemporaryDirectory() as folder:
        import gzip

        rows = Path(folder) / "rows.jsonl"
        with gzip.open(data_folder() / "alpaca/alpaca_data.jsonl.gz", "rt") as source:
            rows.write_text("".join(line for _, line in zip(range(192), source, strict=False)))
        wanted = given.only.split(";") if given.only else list(CONFIGURATIONS)
        for name in wanted:
            if name in found:
                continue
            fixed = {"batch": 8, "schedule": "constant", "save_every": 10**6}
            settings = {**fixed, **CONFIGURATIONS[name], "steps": given.steps}
            found[name] = (child("plan", settings, rows), child("run", settings, rows))
            print(table({name: found[name]}, HEADS["planning.md"]).splitlines()[-1], flush=True)
            if given.out:
                given.out.write_text(json.dumps(found, indent=1))
    if given.only:
        return
    for file, heads in HEADS.items():
        place = ROOT / "docs" / file
        before, _, rest = place.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        place.write_text(f"{before}{BEGIN}\n{table(found, heads)}\n{END}{after}")


if __name__ == "__main__":
    main()
