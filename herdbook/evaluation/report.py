"""Did it get better? One model against another: identity, perplexity, size, speed, memory.

``report.json``::

    {"before": SIDE, "after": SIDE,
     "perplexity": {"en": {"value": 1.004, "low": 0.998, "high": 1.011}, …},   after / before
     "tasks": {"mmlu": {"before", "after", "difference", …}, …},               compared.py
     "asked": {"en": …, "zh": …, "ordinary": …},      held-out questions, paired as tasks are
     "losses": [{"step": 1, "loss": 2.9, …}, …], "gates": [{"name", "limit", "value", "passed"}],
     "verdict": "passed"}

    SIDE = {"ref", "id", "step", "size_bytes", "prefill_tokens_per_s", "decode_tokens_per_s",
            "peak_bytes", "load_s", "texts": {"en": {"perplexity", "nll", "tokens", "passages"}, …},
            "identity": {"shares": {"en": {"value", "low", "high"}, …}, "answers": [Scored, …]}}

A gate that is broken does not lose the report: it is written and entered, and its verdict tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.book import Artifact
from herdbook.book.hashing import digest
from herdbook.book.step import Bench, Input, Inputs, Step, require
from herdbook.data import records
from herdbook.data.records import Conversation, Document
from herdbook.engine.loading import load
from herdbook.errors import ConfigError, nearest
from herdbook.evaluation import compared, identity, paired
from herdbook.evaluation.measure import measure, size_bytes
from herdbook.evaluation.perplexity import default_texts, perplexity, read_text, replies
from herdbook.evaluation.report_page import report_page
from herdbook.evaluation.statistics import perplexity_ratio
from herdbook.evaluation.tasks.step import Evaluate
from herdbook.files.atomic import sha256_once, write_json, write_text

#: the name under which held-out conversations stand among the texts
REPLIES = "replies"
#: the same of held-out documents
DOCUMENTS = "documents"
#: held-out conversations that are scored, and characters of documents; more take longer than they tell
HELDOUT_ROWS, HELDOUT_CHARACTERS = 48, 20_000


@dataclass(frozen=True)
class Heldout:
    """What datasets keep from training: questions about identity, the user's conversations and text."""

    identity: list[Conversation]
    replies: list[Conversation]
    text: str

    @classmethod
    def of(cls, datasets: tuple[Artifact, ...]) -> Heldout:
        questions: list[Conversation] = []
        conversations: list[Conversation] = []
        text = ""
        for dataset in datasets:
            path = dataset.path / "heldout.jsonl"
            if path.is_file():
                for row in records.stream(path):
                    if not isinstance(row, Document):
                        (questions if "expect" in row.extra else conversations).append(row)
                    elif len(text) + len(row.text) < HELDOUT_CHARACTERS:
                        text += f"{row.text}\n\n"
        return cls(questions, conversations[:HELDOUT_ROWS], text)


@dataclass(frozen=True)
class Report(Step):
    """Compare a model with what it was raised from: identity, perplexity, size, speed, memory."""

    kind: ClassVar[str] = "report"
    before: Input = ""
    after: Input = ""
    data: Inputs = ()  # datasets whose held-out part is asked
    adapters: Inputs = ()  # whose loss curve is shown
    text: str = ""  # a file for the perplexity; empty: Herdbook's own texts
    tasks: tuple[str, ...] = ()  # that both sides are asked (herd tasks)
    limit: int = 0  # so many questions of each; 0: all
    max_perplexity_increase: float = 0.03  # gate: on each text; 0: none
    speed: bool = True  # speed and memory as well, each measured in a process of its own
    min_identity: float = 0.9  # gate: right answers, in each language; 0: none
    #: gate: of a task, how much less may be right, {mmlu: 0.01}
    max_drop: Any = field(default_factory=dict)

    def check(self) -> None:
        names = compared.members(self.tasks)
        for ref in names.values():
            Evaluate(self.before, ref, self.limit).check()
        if not isinstance(self.max_drop, Mapping):
            raise ConfigError(
                f"max_drop is {self.max_drop!r}",
                rule="but must be a mapping: {mmlu: 0.01}",
                next="write it into the recipe's YAML: a flag gives text",
            )
        for name, limit in self.max_drop.items():
            if name not in names or not isinstance(limit, int | float) or not 0 <= limit < 1:
                raise ConfigError(
                    f"max_drop: {name}: {limit!r}",
                    rule="must name one of the report's tasks, and a share from 0 to below 1",
                    next=nearest(str(name), [*names]) if names else "name the task among tasks",
                )

    def fingerprint(self) -> dict[str, str]:
        found = {"text": sha256_once(Path(self.text))} if Path(self.text).is_file() else {}
        for name, ref in compared.members(self.tasks).items():
            found[f"task {name}"] = digest(Evaluate(self.before, ref, self.limit).fingerprint())
        return found

    def make(self, bench: Bench) -> dict[str, Any]:
        require(self, "before", "after")
        texts = {"text": read_text(Path(self.text))} if self.text else default_texts()
        heldout = Heldout.of(bench.inputs["data"])
        if heldout.text:
            texts[DOCUMENTS] = heldout.text
        sides = {}
        for name in ("before", "after"):
            artifact = bench.artifact(name)
            kept = bench.work / f"{name}.json"  # survives a kill
            if not kept.is_file():
                bench.progress.say(f"  measuring {artifact.ref} ({name})")
                found = {"ref": artifact.ref, "id": artifact.id, "step": artifact.step}
                write_json(kept, found | side(artifact.path, texts, heldout, self.speed))
            sides[name] = json.loads(kept.read_text(encoding="utf-8"))
        report = compare(sides["before"], sides["after"])
        report["tasks"] = compared.on_tasks(
            bench.artifact("before"), bench.artifact("after"), self.tasks, self.limit, bench
        )
        report["losses"] = [
            json.loads(line)
            for adapter in bench.inputs["adapters"]
            if (adapter.path / "losses.jsonl").is_file()
            for line in (adapter.path / "losses.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        report["gates"] = self.gates(report)
        report["verdict"] = verdict(report["gates"])
        write_json(bench.out / "report.json", report)
        write_text(bench.out / "report.html", report_page(report))
        return metrics(report)

    def gates(self, report: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the recipe demands, and whether it was met."""
        found = []
        if self.max_perplexity_increase:
            for name, ratio in report["perplexity"].items():
                rise = ratio["value"] - 1
                found.append(
                    {
                        "name": f"perplexity ({name}) rises",
                        "limit": self.max_perplexity_increase,
                        "value": rise,
                        "passed": rise <= self.max_perplexity_increase,
                    }
                )
        for name, limit in self.max_drop.items():
            drop = -report["tasks"][name]["difference"]["value"]
            found.append(
                {"name": f"{name} drops", "limit": limit, "value": drop, "passed": drop <= limit}
            )
        if self.min_identity:
            for name, share in report["after"]["identity"]["shares"].items():
                if name != "ordinary":
                    found.append(
                        {
                            "name": f"identity ({name}) is right",
                            "limit": self.min_identity,
                            "value": share["value"],
                            "passed": share["value"] >= self.min_identity,
                        }
                    )
        return found


def side(
    path: Path, texts: Mapping[str, str], heldout: Heldout, speed: bool = True
) -> dict[str, Any]:
    """All that is measured of one model."""
    found: dict[str, Any] = measure(path) if speed else {"size_bytes": size_bytes(path)}
    model = load(str(path))
    found["texts"] = {name: perplexity(model, text) for name, text in texts.items()}
    if heldout.replies:
        found["texts"][REPLIES] = replies(model, heldout.replies)
    scored = identity.score(model.as_teacher(), heldout.identity) if heldout.identity else []
    shares = {name: one.to_json() for name, one in identity.summary(scored).items()}
    found["identity"] = {"shares": shares, "answers": [one.to_json() for one in scored]}
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The two sides, and the paired ratios of their perplexities."""
    ratios = {
        name: perplexity_ratio(before["texts"][name]["passages"], text["passages"]).to_json()
        for name, text in after["texts"].items()
    }
    return {"before": before, "after": after, "perplexity": ratios, "asked": asked(before, after)}


def asked(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Of the held-out questions of each kind (en, zh, ordinary), paired: what paired.compare says."""
    sides = [
        {(one["language"], one["question"]): one for one in side["identity"].get("answers", ())}
        for side in (before, after)
    ]
    marks: dict[str, list[tuple[float, float]]] = {}
    for key, one in sides[1].items():
        if key in sides[0]:
            name = "ordinary" if one["ask"] == "none" else one["language"]
            pair = float(sides[0][key]["right"]), float(one["right"])
            marks.setdefault(name, []).append(pair)
    return {
        name: paired.compare([one for one, _ in pairs], [one for _, one in pairs])
        for name, pairs in marks.items()
    }


def verdict(gates: list[dict[str, Any]]) -> str:
    """«passed», or «failed: …» with each broken gate's figures."""
    broken = [
        f"{gate['name']} {100 * gate['value']:.1f} %, "
        f"{'at least' if gate['name'].endswith(' is right') else 'at most'} {100 * gate['limit']:g} %"
        for gate in gates
        if not gate["passed"]
    ]
    return "failed: " + "; ".join(broken) if broken else "passed"


def metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """The flat figures for the tree and the list."""
    after = report["after"]
    return {
        "verdict": report["verdict"],
        **flat(after),
        **{
            f"perplexity_{name}_change_share": ratio["value"] - 1
            for name, ratio in report["perplexity"].items()
        },
        **{
            f"{name}_gain_share": one["difference"]["value"]
            for name, one in report.get("tasks", {}).items()
        },
    }


#: of a side, what the tree and the list show; all but the size only where speed was measured
FIGURES = ("size_bytes", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes")


def flat(one: Mapping[str, Any]) -> dict[str, Any]:
    """A side in flat figures, named so that `human_metric` dresses them."""
    shares = one["identity"]["shares"]
    return {
        **{
            f"{'identity_' if name != 'ordinary' else ''}{name}_share": share["value"]
            for name, share in shares.items()
        },
        **{f"perplexity_{name}": text["perplexity"] for name, text in one["texts"].items()},
        **{name: one[name] for name in FIGURES if name in one},
    }
