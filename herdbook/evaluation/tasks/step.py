"""The step that asks a model a task (task.py) and enters what it answered into the book.

    evaluation.json   {"task", "version", "prompt_hash", "data_hash", "model": {"ref", "id"}, "chat",
                       "metric", "value", "low", "high", …}     the figures: results.py
    items.jsonl       a row for each question and seed           scoring.py

A killed run goes on: batches that are done lie in `bench.work`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.book import Artifact
from herdbook.book.hashing import digest
from herdbook.book.step import Bench, Input, Step, require
from herdbook.engine.loaded import LoadedModel
from herdbook.engine.loading import load
from herdbook.errors import ConfigError, TemplateError
from herdbook.evaluation.marks.scorers import scorer
from herdbook.evaluation.tasks import items, scoring
from herdbook.evaluation.tasks.results import overall, summarise
from herdbook.evaluation.tasks.task import Group, Task
from herdbook.files.atomic import write_json, write_text
from herdbook.tokens import templates

RESULT, ITEMS = "evaluation.json", "items.jsonl"


@dataclass(frozen=True)
class Evaluate(Step):
    """Ask a model a task's questions: its score with interval, by group, and every answer."""

    kind: ClassVar[str] = "report"
    model: Input = ""
    task: str = ""  # one of `herd tasks`, a .yaml, a file of rows, or a text
    limit: int = 0  # so many questions, spread evenly over the file; 0: all
    shots: int | None = None  # examples before each question; none: as the task says
    seeds: tuple[int, ...] = (0,)  # of replies that are drawn (temperature above 0)
    chat: bool = False  # ask by the model's chat template, not as plain text

    def check(self) -> None:
        require(self, "model", "task")
        if self.limit < 0:
            raise ConfigError(f"limit {self.limit}", rule="must be 0 (all) or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(
                f"seeds {list(self.seeds)}", rule="must be different whole numbers from 0"
            )
        for task in self.tasks():
            if task.kind == "generate":
                for metric in task.metrics:
                    scorer(metric)
            if len(self.seeds) > 1 and not (task.kind == "generate" and task.temperature):
                raise ConfigError(
                    f"{len(self.seeds)} seeds for task {task.name}",
                    rule="in which nothing is drawn (temperature 0): all would be the same",
                    next="give one seed, or a task with a temperature",
                )
            if self.chat and task.kind == "text":
                raise ConfigError(
                    f"task {task.name} as a chat", rule="is none: a text is scored as it stands"
                )
            items.hashes(task)  # its files are here

    def tasks(self) -> list[Task]:
        """The one that is asked, or the members of a group."""
        found = items.find(self.task)
        if isinstance(found, Task):
            return [found.with_shots(self.shots)]
        members = [items.find(one) for one in found.tasks]
        tasks = [one for one in members if isinstance(one, Task) and one.kind != "text"]
        if self.shots is not None or len(tasks) < len(members):
            raise ConfigError(
                f"group {found.name}",
                rule="takes no shots (each task has its own), and holds neither groups nor texts",
                next="herd tasks " + found.name,
            )
        return tasks

    def fingerprint(self) -> dict[str, str]:
        told: dict[str, str] = {}
        for task in self.tasks():
            told |= {task.name: digest(task.asked()), **items.hashes(task)}
        return told

    def make(self, bench: Bench) -> dict[str, Any]:
        found = items.find(self.task)
        if isinstance(found, Group):
            return self._group(found, bench)
        (task,), artifact = self.tasks(), bench.artifact("model")
        asked = items.questions(task, self.limit)
        model = load(artifact.id, book=bench.book)
        head = {
            "task": task.name,
            "version": task.version,
            "about": task.about,
            "kind": task.kind,
            "shots": task.shots,
            "of": asked.total,
            "prompt_hash": asked.prompt_hash,
            "data_hash": asked.data_hash,
            "model": {"ref": artifact.ref, "id": artifact.id},
            "chat": _template(model) if self.chat else "",
        }
        rows = {}
        for seed in self.seeds:
            batches = scoring.batches(model, task, asked.items, self.limit)
            answered = _Answered(bench.work / f"{seed}.jsonl", batches)
            total = sum(map(len, batches))
            with bench.progress.task(
                task.name, total=total, unit="questions", done=len(answered.rows)
            ) as bar:
                for batch in answered.missing():
                    new = scoring.run(model, task, batch, seed=seed, chat=self.chat)
                    answered.add(new)
                    bar.advance(len(batch))
            rows[seed] = answered.rows
        if task.kind != "text":
            order = {item.id: place for place, item in enumerate(asked.items)}
            for some in rows.values():
                some.sort(key=lambda row: order[row["id"]])
        result = head | summarise(task, asked.items, rows)
        several = len(rows) > 1
        lines = [
            json.dumps({"seed": seed, **row} if several else row, ensure_ascii=False) + "\n"
            for seed, some in rows.items()
            for row in some
        ]
        write_json(bench.out / RESULT, result)
        write_text(bench.out / ITEMS, "".join(lines))
        return metrics(result)

    def _group(self, group: Group, bench: Bench) -> dict[str, Any]:
        """Each task is a report of its own; the group's has their figures, and their mean."""
        artifact, members = bench.artifact("model"), {}
        for name in group.tasks:
            report = replace(self, model=artifact.id, task=name).run(
                bench.book, name=report_name(artifact, name), progress=bench.progress
            )
            figures = read(report)
            members[name] = {key: figures[key] for key in SHORT} | {"report": report.id}
        result = {
            "task": group.name,
            "version": group.version,
            "about": group.about,
            "kind": "group",
            "model": {"ref": artifact.ref, "id": artifact.id},
            **overall(members),
            "tasks": members,
        }
        write_json(bench.out / RESULT, result)
        return metrics(result)


#: what a group tells of each of its tasks
SHORT = ("version", "prompt_hash", "data_hash", "n", "metric", "value", "low", "high", "stderr")


class _Answered:
    """The rows of the batches that are done, in a file that grows by a batch at a time."""

    def __init__(self, path: Path, batches: Sequence[Sequence[Any]]) -> None:
        self.path, self.batches = path, batches
        self.rows: list[dict[str, Any]] = []
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        self.done, kept = 0, 0
        for batch in batches:  # a kill may have cut the last one
            if kept + len(batch) > len(lines):
                break
            self.done, kept = self.done + 1, kept + len(batch)
        self.rows = [json.loads(line) for line in lines[:kept]]
        with path.open("ab") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:kept]))

    def missing(self) -> Sequence[Sequence[Any]]:
        return self.batches[self.done :]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows


def _template(model: LoadedModel) -> str:
    """The chat template's name, or its hash where it is the model's own."""
    source = model.tokenizer.chat_template
    if source is None:
        raise TemplateError(
            f"{model.path}",
            rule="has no chat template, so it cannot be asked as a chat",
            next="leave --chat out",
        )
    known = (name for name in templates.shipped() if templates.read(name) == source)
    return next(known, digest(source))


def report_name(artifact: Artifact, task: str) -> str:
    """What the report of a task is called in the book: luna-mmlu."""
    return f"{artifact.name}-{Path(task).name.partition('.')[0]}"


def read(report: Artifact) -> dict[str, Any]:
    """The figures of a report."""
    found: dict[str, Any] = json.loads((report.path / RESULT).read_text(encoding="utf-8"))
    return found


def metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    """The flat figures for the tree and the list."""
    name = result.get("metric", "mean")
    share = "" if result["kind"] == "text" or name.startswith("mrr") else "_share"
    flat = {f"{name}{end}{share}": result[key] for end, key in _ENDS}
    if "unparsed" in result:
        flat["unparsed_share"] = result["unparsed"]["share"]
    return {"task": result["task"], "n": result.get("n", len(result.get("tasks", ()))), **flat}


_ENDS = (("", "value"), ("_low", "low"), ("_high", "high"))
