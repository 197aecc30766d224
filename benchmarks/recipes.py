"""Every recipe's cpu profile on real rows → benchmarks/recipes.json, which docs/recipes.py shows.

    python benchmarks/recipes.py DATA [NAME …]     DATA: the folder of real data; names: only these

Each recipe is raised by the command line in an empty home of its own; what it measured is kept beside
what was measured before, so one recipe can be run again alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from herdbook.files.atomic import write_json
from herdbook.recipe import Recipe, shipped

RESULTS = Path(__file__).with_suffix(".json")
ENGLISH, CHINESE = "alpaca/alpaca_data.jsonl.gz", "alpaca_zh/alpaca_zh.jsonl.gz"
WIKI = "text/llama_factory_wiki_demo.txt.gz"
#: recipe → the files that its settings are given; others take English instructions
FILES = {
    "vicuna": {"data": "sharegpt/sharegpt_sample.jsonl.gz"},
    "koala": {"data": "sharegpt/sharegpt_sample.jsonl.gz"},
    "baize": {"data": "sharegpt/sharegpt_sample.jsonl.gz"},
    "belle": {"data": CHINESE},
    "firefly": {"data": CHINESE},
    "taoli": {"data": CHINESE},
    "lawgpt": {"data": CHINESE, "text": WIKI},
    "cama": {"data": CHINESE, "text": WIKI},
    "huatuo": {"data": "huatuo/llama_data.jsonl.gz"},
    "camel": {"data": "medical_kg/chatdoctor5k.jsonl.gz", "text": WIKI},
    "llama": {"text": "text/tinyshakespeare.txt"},
    "cerebras-gpt": {"text": "text/tinyshakespeare.txt"},
    "chinese-llama-alpaca": {
        "data": CHINESE,
        "text": WIKI,
        "pieces": "tokenizers/chinese_sp.model",
    },
    "billa": {"data": CHINESE, "tasks": ENGLISH, "text": WIKI},
}
#: they need a LLaMA with a SentencePiece tokenizer: the one that the recipe llama raises
ON_LLAMA = ("chinese-llama-alpaca", "billa")


def herd(home: Path, name: str, *flags: str) -> dict[str, Any]:
    """`herd raise …` in a home of its own: what it says as JSON. The gates are open."""
    gates = ["--report.max_perplexity_increase=0"] if "report" in Recipe.read(name).steps else []
    done = subprocess.run(
        [sys.executable, "-m", "herdbook.cli", "raise", name, *flags, *gates, "--json"],
        env={**os.environ, "HERDBOOK_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def measure(name: str, data: Path, home: Path) -> dict[str, Any]:
    given = FILES.get(name, {"data": ENGLISH})
    flags = [f"--{key}={data / file}" for key, file in given.items()]
    if name in ON_LLAMA:
        llama = herd(home, "llama", f"--text={data / FILES['llama']['text']}")["result"]["id"]
        kept = home / "artifacts" / "model" / llama.removeprefix("sha256:")[:16]
        flags.append(f"--base={kept}")
    began = time.monotonic()
    raised = herd(home, name, *flags)
    seconds = time.monotonic() - began
    from herdbook.book.book import Book

    book = Book(home)
    tunes = [book.get(ref) for ref in (*raised["made"], *raised["kept"])]
    tunes = [one for one in tunes if one.step == "Tune"]
    report = next(iter(raised["reports"].values()), {})
    return {
        "files": given,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[1], 1),
        "tune": [
            {key: one.metrics[key] for key in ("rows", "steps", "trained_tokens", "first_loss", "loss")}
            for one in tunes
        ],
        "report": {k: v for k, v in report.items() if k.startswith("perplexity_") or k in
                   ("alpha", "largest_error")},
    }  # fmt: skip


def main(data: Path, *names: str) -> None:
    for name in names or [one for one in shipped() if one != "cria"]:
        assert Recipe.read(name).profiles.keys() >= {"cpu", "full"}
        with tempfile.TemporaryDirectory() as home:
            found = measure(name, data, Path(home))
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        write_json(RESULTS, dict(sorted({**results, name: found}.items())))
        print(name, json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
