"""Tasks and their results in a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from herdbook import config
from herdbook.evaluation.marks.scorers import SCORERS, TOGETHER
from herdbook.evaluation.tasks import items
from herdbook.evaluation.tasks.task import JUDGED_METRICS, Group, Task, read, shipped


def tasks() -> dict[str, dict[str, Any]]:
    """Of each shipped task and group: what it is, its state (here, no data, no scorer, group), where
    its data come from."""
    return {name: _row(read(name)) for name in shipped()}


def task(name: str) -> dict[str, Any]:
    """One of them in full."""
    found = items.find(name)
    plain = {key: value for key, value in config.to_mapping(found).items() if value not in ("", [])}
    plain.pop("folder", None)
    return plain | {"state": _row(found)["state"]}


def _row(one: Task | Group) -> dict[str, Any]:
    if isinstance(one, Group):
        return {"about": one.about, "state": "group", "tasks": list(one.tasks)}
    known = {*SCORERS, *TOGETHER, *JUDGED_METRICS}
    unscored = one.kind == "generate" and not known.issuperset(one.metrics)
    state = "no scorer" if unscored else "here" if one.present else "no data"
    return {
        "about": one.about,
        "state": state,
        "kind": one.kind,
        "version": one.version,
        "shots": one.shots,
        "metrics": list(one.metrics),
        "data": one.data,
        "source": one.source,
        "licence": one.licence,
    }


def lines(figures: Mapping[str, Any]) -> list[str]:
    """A report's headline with what is needed to read it.

    mmlu: acc 45.1 % (43.0 … 47.2), chance 25.0 %
      2,000 of 14,042 questions, 5 examples each; by group 44.9 %; unparsed 0.0 %; version 1
    """
    if figures["kind"] == "group":
        rows = [f"{figures['task']}: {_shown(figures, share=True)}, {figures['average']}"]
        for name, one in figures["tasks"].items():
            rows.append(
                f"  {name}: {one['metric']} {_shown(one, share=True)}, {one['n']:,} questions"
            )
        return rows + ([_judge(figures)] if "judge" in figures else [])
    share = figures["kind"] != "text"
    head = f"{figures['task']}: {_name(figures['metric'])} {_shown(figures, share)}"
    if "chance" in figures:
        head += f", chance {100 * figures['chance']:.1f} %"
    if not share:
        other = figures["metrics"]["perplexity"]
        notes = [f"perplexity {_shown(other, share)}", f"{figures['n']:,} windows"]
    else:
        notes = [
            f"{figures['n']:,} of {figures['of']:,} questions, {figures['shots']} examples each"
        ]
        notes += [
            f"{_name(name)} {_shown(one, share)}"
            for name, one in figures["metrics"].items()
            if name != figures["metric"]
        ]
        notes += [
            f"{name} {100 * value:.1f} %"
            for name, value in figures.get("averages", {}).items()
            if name != figures["average"]
        ]
        notes.append(f"unparsed {100 * figures['unparsed']['share']:.1f} %")
    if "spread" in figures:
        notes.append(
            f"{len(figures['seeds'])} seeds, standard deviation {100 * figures['spread']:.1f}"
        )
    if figures["chat"]:
        notes.append("as a chat")
    rows = [head, f"  {'; '.join(notes)}; version {figures['version']}"]
    if "judge" in figures:
        rows += _judged(figures)
    return rows


def _judged(figures: Mapping[str, Any]) -> list[str]:
    """By class, who judged, and where the judge gave no verdict."""
    rows = [
        f"  {_name(name)}: {_shown(one, share=True)}, {one['n']:,} questions"
        for name, one in figures.get("groups", {}).items()
    ]
    rows.append(_judge(figures))
    for one in figures["unparsed"]["examples"]:
        rows.append(f"  no verdict on {one['id']}: {one['why']}: … {one['reply'][-120:]!r}")
    return rows


def _judge(figures: Mapping[str, Any]) -> str:
    judge = figures["judge"]
    return f"  judged by {judge.get('ref') or judge['model'] + ' at ' + judge['url']}"


def _name(metric: str) -> str:
    return metric.replace("_", " ")


def _shown(one: Mapping[str, Any], share: bool) -> str:
    if share:
        return f"{100 * one['value']:.1f} % ({100 * one['low']:.1f} … {100 * one['high']:.1f})"
    return f"{one['value']:.4g} ({one['low']:.4g} … {one['high']:.4g})"
