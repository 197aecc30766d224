"""The step that asks a model a task (task.py) and enters what it answered into the book.

    evaluation.json   {"task", "version", "prompt_hash", "data_hash", "model": {"ref", "id"}, "chat",
                       "metric", "value", "low", "high", …}     the figures: results.py
                      with a judge: "judge": {"ref", "id"} or {"url", "model"}, and "prompt_hash"
    items.jsonl       a row for each question and seed           scoring.py

A killed run goes on: batches that are done lie in `bench.work`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.book import Artifact
from herdbook.book.hashing import digest
from herdbook.book.step import Bench, Input, Step, require
from herdbook.engine.loaded import LoadedModel
from herdbook.engine.loading import load
from herdbook.errors import ConfigError, TemplateError
from herdbook.evaluation.answered import Answered
from herdbook.evaluation.judging import safety, teachers
from herdbook.evaluation.marks import scorers
from herdbook.evaluation.tasks import items, judged, scoring
from herdbook.evaluation.tasks.results import Rows, overall, summarise
from herdbook.evaluation.tasks.task import JUDGED_METRICS, Group, Item, Task
from herdbook.files.atomic import write_json, write_text
from herdbook.tokens import templates

RESULT, ITEMS = "evaluation.json", "items.jsonl"
#: replies judged at once
JUDGED = 64


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
    judge: Input = ""  # a model that judges the replies, where the task needs one
    judge_url: str = ""  # or the base of an OpenAI-compatible API
    judge_name: str = ""  # the judge's name there

    def check(self) -> None:
        require(self, "model", "task")
        if self.limit < 0:
            raise ConfigError(f"limit {self.limit}", rule="must be 0 (all) or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(
                f"seeds {list(self.seeds)}", rule="must be different whole numbers from 0"
            )
        tasks = self.tasks()
        self._check_judge(tasks)
        for task in tasks:
            if task.kind == "generate":
                for metric in task.metrics:
                    if metric not in JUDGED_METRICS:
                        scorers.check(metric)
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

    def _check_judge(self, tasks: Sequence[Task]) -> None:
        needing = [task.name for task in tasks if task.judged]
        if self.judge and self.judge_url:
            raise ConfigError(
                f"the judges {self.judge} and {self.judge_url}",
                rule="are two, where one judges",
                next="give judge or judge_url",
            )
        if self.judge_url:
            teachers.need_name(
                self.judge_url, self.judge_name, "--judge-name NAME (in a recipe judge_name)"
            )
        if needing and not (self.judge or self.judge_url):
            raise ConfigError(
                f"task {needing[0]}",
                rule="is told by a judge, and none is given",
                next=f"herd eval {self.model} --task {self.task} --judge REF, a model; or --judge "
                "https://HOST/v1 --judge-name NAME",
            )
        if not needing and (self.judge or self.judge_url or self.judge_name):
            raise ConfigError(
                f"a judge for task {self.task}",
                rule="has nothing to judge: the task has its own scorers",
                next="leave the judge out",
            )

    def for_its_task(self) -> Evaluate:
        """The same, without a judge where the task needs none: its report does not depend on one."""
        if any(task.judged for task in self.tasks()):
            return self
        return replace(self, judge="", judge_url="", judge_name="")

    def tasks(self) -> list[Task]:
        """The one that is asked, or the members of a group."""
        found = items.find(self.task)
        if isinstance(found, Task):
            return [found.with_shots(self.shots)]
        members = [items.find(one) for one in found.tasks]
        tasks = [one for one in members if isinstance(one, Task) and one.kind != "text"]
        if len({task.name for task in tasks}) < len(tasks):
            raise ConfigError(
                f"group {found.name}", rule="has two tasks of one name", next="rename one"
            )
        if self.shots is not None or len(tasks) < len(members):
            raise ConfigError(
                f"group {found.name}",
                rule="takes no shots (each task has its own), and holds neither groups nor texts",
                next="herd tasks " + found.name,
            )
        return tasks

    def fingerprint(self) -> dict[str, str]:
        told: dict[str, str] = {}
        for place, task in enumerate(self.tasks()):
            about: dict[str, Any] = {"asked": task.asked(), "files": items.hashes(task)}
            if task.judged:
                about["judge"] = safety.prompt_hash(task.language)
            told[f"task {place}: {task.name}"] = digest(about)
        if isinstance(found := items.find(self.task), Group):
            told["group"] = digest({"version": found.version, "average": found.average})
        return told

    def make(self, bench: Bench) -> dict[str, Any]:
        found = items.find(self.task)
        if isinstance(found, Group):
            return self._group(found, bench)
        (task,), artifact = self.tasks(), bench.artifact("model")
        asked = items.questions(task, self.limit)
        model, chat = load(artifact.id, book=bench.book), self.chat or task.chat
        head: dict[str, Any] = {
            "task": task.name,
            "version": task.version,
            "about": task.about,
            "kind": task.kind,
            "shots": task.shots,
            "of": asked.total,
            "prompt_hash": asked.prompt_hash,
            "data_hash": asked.data_hash,
            "model": {"ref": artifact.ref, "id": artifact.id},
            "chat": _template(model) if chat else "",
        }
        rows: dict[int, Rows] = {}
        for seed in self.seeds:
            batches = scoring.batches(model, task, asked.items, self.limit)
            answer = partial(scoring.run, model, task, seed=seed, chat=chat)
            answered = Answered(bench.work / f"{seed}.jsonl", batches)
            rows[seed] = answered.fill(answer, bench.progress, task.name)
        if task.judged:
            del model, answer  # its memory is the judge's now
            head["judge"] = self._judge(bench) | {"prompt_hash": safety.prompt_hash(task.language)}
            rows = self._judged(task, asked.items, rows, bench)
        if task.kind != "text":
            order = {item.id: place for place, item in enumerate(asked.items)}
            rows = {
                seed: sorted(some, key=lambda row: order[row["id"]]) for seed, some in rows.items()
            }
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

    def _judge(self, bench: Bench) -> dict[str, Any]:
        """Who judges, for the result."""
        if self.judge_url:
            return {"url": self.judge_url, "model": self.judge_name}
        artifact = bench.artifact("judge")
        return {"ref": artifact.ref, "id": artifact.id}

    def _judged(
        self, task: Task, asked: Sequence[Item], rows: Mapping[int, Rows], bench: Bench
    ) -> dict[int, Rows]:
        """The rows with verdicts; these are kept as they come, as the answers were."""
        judge = self.judge_url or bench.artifact("judge").id
        teacher = teachers.opened(judge, self.judge_name, book=bench.book)
        answer = partial(judged.run, teacher, task, {item.id: item for item in asked})
        found: dict[int, Rows] = {}
        for seed, some in rows.items():
            batches = [some[n : n + JUDGED] for n in range(0, len(some), JUDGED)]
            verdicts = Answered(bench.work / f"{seed}-judged.jsonl", batches)
            found[seed] = verdicts.fill(answer, bench.progress, f"{task.name}, judged")
        return found

    def _group(self, group: Group, bench: Bench) -> dict[str, Any]:
        """Each task is a report of its own; the group's has their figures, and their mean."""
        artifact, members = bench.artifact("model"), {}
        for name in group.tasks:
            member = replace(self, model=artifact.id, task=name).for_its_task()
            report = member.run(
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
        if self.judge or self.judge_url:
            result["judge"] = self._judge(bench)
        write_json(bench.out / RESULT, result)
        return metrics(result)


#: what a group tells of each of its tasks
SHORT = ("version", "prompt_hash", "data_hash", "n", "metric", "value", "low", "high", "stderr")


def _template(model: LoadedModel) -> str:
    """The chat template's name, or its hash where it is the model's own."""
    source = model.tokenizer.chat_template
    if source is None:
        raise TemplateError(
            f"{model.path}",
            rule="has no chat template, so it cannot be asked as a chat",
            next="tune it to chat first; a task that need not be a chat is asked without --chat",
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
