"""MMLU with five examples on two cores: Herdbook's engine and lm-evaluation-harness on the same prompts.

    python benchmarks/evaluation.py                everything; writes RESULTS.md; a quarter of an hour
    python benchmarks/evaluation.py --questions 20     a trial; writes nothing

The peer is lm-evaluation-harness's own MMLU (its tasks, its hf backend on transformers) with the rows
of $HERDBOOK_DATA/mmlu, at the batch size that is fastest on a few questions. Both sides have SmolLM2-135M's
packaged weights, dense in float32, and must show the same prompts, which is checked. Timed is, on either
side, from the questions as text to the likelihood of each letter; loading and reading files are not.
Herdbook once more with the weights as packaged (int4, the native step): another rounding, so other figures.

Two samples, as what questions have in common decides: *spread* takes every so-manieth question of the file
(few of each subject), *subjects* every question of some subjects, as a run over all of MMLU does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import Claim, Recorder, conditions, say, spread
from side import Side, data_folder, serve

PEERS = ("lm_eval", "transformers", "datasets", "accelerate")
#: not `auto`: it looks for the largest that memory allows, which on a processor takes minutes or ends the
#: process, and larger ones are slower (with 16 at most 477 s, where 1 took 28 s: 20 questions, two cores)
BATCH_SIZES = (1, 2, 8)
#: questions on which the batch size is chosen
PILOT = 12
#: of ours
ROUNDS = 3


class Ours:
    """herdbook's task, asked as `herd eval --task mmlu` asks it."""

    def open(self, path: str, dtype: str) -> None:
        from herdbook.engine.loading import load

        self.model = load(path, dtype=dtype or None, device="cpu")

    def about(self) -> dict[str, str]:
        return {"computed by": type(self.model.model).__name__}

    def ask(self, ids: Sequence[str]) -> dict[str, Any]:
        """{"seconds", "rows": {id: {"prompt", "logprobs"}}}"""
        from herdbook.evaluation.tasks import items, scoring
        from herdbook.evaluation.tasks.task import Task

        task = items.find("mmlu")
        assert isinstance(task, Task)
        wanted = set(ids)
        some = [one for one in items.questions(task).items if one.id in wanted]
        begun = time.perf_counter()
        rows = [
            row
            for batch in scoring.batches(self.model, task, some)
            for row in scoring.run(self.model, task, batch)
        ]
        seconds = time.perf_counter() - begun
        prompts = {one.id: one.context() for one in some}
        told = {
            row["id"]: {"prompt": prompts[row["id"]], "logprobs": row["logprobs"]} for row in rows
        }
        return {"seconds": seconds, "rows": told}


class Harness:
    """lm-evaluation-harness's mmlu_* tasks on its hf backend."""

    def open(self, path: str, desk: str) -> None:
        from lm_eval.models.huggingface import HFLM

        class Timed(HFLM):
            """With the seconds that all its likelihoods took."""

            seconds = 0.0

            def loglikelihood(self, requests: Any, **more: Any) -> Any:
                begun = time.perf_counter()
                found = super().loglikelihood(requests, **more)
                self.seconds += time.perf_counter() - begun
                return found

        self.path, self.desk, self.kind = path, Path(desk), Timed

    def ask(self, rows: Sequence[dict[str, Any]], batch_size: int) -> dict[str, Any]:
        """rows: of the test file, with `id`; the same answer as Ours.ask."""
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager

        subjects: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            subjects.setdefault(row["subject"], []).append(row)
        with tempfile.TemporaryDirectory(dir=self.desk) as folder:
            for name, some in subjects.items():
                self._write(Path(folder), name, some)
            lm = self.kind(
                self.path,
                dtype="float32",
                device="cpu",
                batch_size=batch_size,
            )
            found = evaluator.simple_evaluate(
                model=lm,
                tasks=[f"here_{name}" for name in subjects],
                num_fewshot=5,
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
            )
        told = {}
        for name, some in subjects.items():
            for sample in found["samples"][f"here_{name}"]:
                likelihoods = [float(one[0]) for one in sample["filtered_resps"]]
                prompt = sample["arguments"][0][0]
                told[some[sample["doc_id"]]["id"]] = {"prompt": prompt, "logprobs": likelihoods}
        return {"seconds": lm.seconds, "rows": told}

    def _write(self, folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Their own task of a subject, over local files."""
        import lm_eval
        import yaml

        dev = [row for row in read("dev.jsonl") if row["subject"] == name]
        files = {}
        for split, some in (("test", rows), ("dev", dev)):
            written = [
                {
                    "question": row["question"],
                    "choices": [row[one] for one in "ABCD"],
                    "answer": "ABCD".index(row["answer"]),
                }
                for row in some
            ]
            path = folder / f"{name}.{split}.jsonl"
            path.write_text("".join(json.dumps(one) + "\n" for one in written))
            files[split] = str(path)
        task = {
            "include": str(
                Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / f"mmlu_{name}.yaml"
            ),
            "task": f"here_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        (folder / f"here_{name}.yaml").write_text(yaml.safe_dump(task))


def read(name: str) -> list[dict[str, Any]]:
    """The rows of one of MMLU's files, numbered as Herdbook's items are."""
    from herdbook.data import formats

    rows = formats.rows(data_folder() / "mmlu" / name)
    return [{**row, "id": str(number)} for number, (_, _, row) in enumerate(rows, start=1)]


def samples(rows: list[dict[str, Any]], count: int) -> dict[str, list[dict[str, Any]]]:
    """The two samples, of about `count` questions each: whole subjects, evenly over the list of them."""
    names = list(dict.fromkeys(row["subject"] for row in rows))
    of = {name: [row for row in rows if row["subject"] == name] for name in names}
    few = 1 if count < 100 else 2
    chosen = [names[(2 * place + 1) * len(names) // (2 * few)] for place in range(few)]
    return {
        "spread": [rows[place * len(rows) // count] for place in range(count)],
        "subjects": [row for name in chosen for row in of[name][: count // few]],
    }


class Bench:
    """The models, the sides, the recorder."""

    def __init__(self, folder: Path) -> None:
        import torch

        from herdbook.model.checkpoint import load_decoder, save_hf
        from herdbook.model.references import resolve
        from herdbook.tokens.tokenizer import Tokenizer

        packaged = resolve("smollm2", None)
        dense = folder / "smollm2"
        decoder = load_decoder(packaged, torch.float32)
        save_hf(decoder, Tokenizer.load(packaged), dense, torch.float32)
        del decoder
        self.recorder = Recorder(
            "evaluation",
            conditions(PEERS, model="SmolLM2-135M-Instruct, the packaged Q4_1; dense in float32"),
        )
        self.ours = {"float32": Side(__file__, "Ours"), "int4": Side(__file__, "Ours")}
        self.harness = Side(__file__, "Harness")
        self.ours["float32"].ask("open", path=str(dense), dtype="float32")
        self.ours["int4"].ask("open", path=str(packaged), dtype="")
        for way, side in self.ours.items():
            (by,) = side.ask("about").values()
            self.recorder.conditions[f"Herdbook's {way} is computed by"] = by
        self.harness.ask("open", path=str(dense), desk=str(folder))

    def fastest(self, rows: list[dict[str, Any]]) -> int:
        """The harness's best batch size."""
        seconds = {}
        for size in BATCH_SIZES:
            seconds[size] = self.harness.ask("ask", rows=rows, batch_size=size)["seconds"]
            say(f"lm-evaluation-harness, batch_size={size}: {seconds[size]:.1f} s for {len(rows)}")
        best = min(seconds, key=seconds.__getitem__)
        self.recorder.conditions["the harness's batch size"] = (
            f"{best}, the fastest of "
            + ", ".join(f"{size} ({took:.1f} s)" for size, took in seconds.items())
            + f" on {len(rows)} questions"
        )
        return best

    def compare(self, name: str, rows: list[dict[str, Any]], size: int) -> None:
        """One sample: our rounds, then the harness's one."""
        ids = [row["id"] for row in rows]
        ours = {
            way: [side.ask("ask", ids=ids) for _ in range(ROUNDS)]
            for way, side in self.ours.items()
        }
        peer = self.harness.ask("ask", rows=rows, batch_size=size)
        right = {row["id"]: "ABCD".index(row["answer"]) for row in rows}
        subjects = len({row["subject"] for row in rows})
        for way, runs in ours.items():
            seconds, words = spread([one["seconds"] for one in runs])
            how = (
                f"{len(rows)} questions of {subjects} subjects, 5 examples each; "
                f"{agreement(runs[-1]['rows'], peer['rows'], right)}. Ours: {words}. Harness: one run"
            )
            label = "both float32" if way == "float32" else "ours int4 as packaged, theirs float32"
            self.recorder.add(
                Claim(
                    f"MMLU, {name}, {label}",
                    "s",
                    seconds,
                    peer["seconds"],
                    "lm-evaluation-harness hf",
                    how,
                    more_is_better=False,
                )
            )

    def close(self) -> None:
        for side in (*self.ours.values(), self.harness):
            side.close()


def agreement(
    ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]], right: dict[str, int]
) -> str:
    """Whether the two say the same, in words; SystemExit where a prompt differs."""
    assert ours.keys() == theirs.keys() == right.keys()
    same, gaps, shares = 0, [], [0, 0]
    for id, mine in ours.items():
        other = theirs[id]
        if mine["prompt"] != other["prompt"]:
            raise SystemExit(
                f"row {id} is asked otherwise:\n{mine['prompt']}\n---\n{other['prompt']}"
            )
        taken = [side["logprobs"].index(max(side["logprobs"])) for side in (mine, other)]
        same += taken[0] == taken[1]
        gaps += [abs(a - b) for a, b in zip(mine["logprobs"], other["logprobs"], strict=True)]
        shares = [count + (one == right[id]) for count, one in zip(shares, taken, strict=True)]
    return (
        f"the same letter taken in {same} of {len(right)}, log-likelihoods differ by "
        f"{max(gaps):.2g} at most ({statistics.median(gaps):.2g} in the middle), "
        f"right {100 * shares[0] / len(right):.1f} % : {100 * shares[1] / len(right):.1f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=0, help="so many; writes no results")
    parser.add_argument("--side", choices=("Ours", "Harness"), help="used within")
    given = parser.parse_args()
    if given.side:
        serve({"Ours": Ours, "Harness": Harness}[given.side]())
        return
    os.environ["HERDBOOK_DATA"] = str(data_folder())
    if not (data_folder() / "mmlu" / "test.jsonl.gz").is_file():
        sys.exit(
            f"no mmlu/test.jsonl.gz in {data_folder()}: `herd eval smollm2 --task mmlu` says how"
        )
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="herdbook-bench-") as folder:
        os.environ["HF_HOME"] = folder  # where the harness keeps its copies of the rows
        bench = Bench(Path(folder))
        try:
            chosen = samples(read("test.jsonl.gz"), given.questions or 200)
            size = bench.fastest(
                chosen["spread"][:: max(1, len(chosen["spread"]) // PILOT)][:PILOT]
            )
            for name, rows in chosen.items():
                bench.compare(name, rows, size)
        finally:
            bench.close()
    say(f"{time.monotonic() - begun:.0f} s in all")
    if not given.questions:
        bench.recorder.write()


if __name__ == "__main__":
    main()
