"""Is the one model better than the other: at what, by how much, with what certainty, at what cost?

A difference is *shown* where its 95 % interval leaves zero out; where none is shown, the smallest that
would have been is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from herdbook.book.book import Artifact
from herdbook.book.tree import human_bytes


def read_report(artifact: Artifact) -> dict[str, Any]:
    """What the step Report wrote."""
    found: dict[str, Any] = json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))
    return found


def answer(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{"better": […], "worse": […], "undecided": […]}: each {"what", "value", "low", "high"} and, of a
    task, "detectable"; values are signed so that above zero is better."""
    told: dict[str, list[dict[str, Any]]] = {"better": [], "worse": [], "undecided": []}
    questions = {_ASKED.get(name, name): one for name, one in report.get("asked", {}).items()}
    for name, one in [*questions.items(), *report.get("tasks", {}).items()]:
        gain = one["difference"] | {"what": name, "detectable": one["detectable"]}
        told[_direction(gain)].append(gain)
    for name, ratio in report["perplexity"].items():
        fall = {"value": 1 - ratio["value"], "low": 1 - ratio["high"], "high": 1 - ratio["low"]}
        told[_direction(fall)].append(fall | {"what": f"perplexity ({name})"})
    return told


_ASKED = {
    "en": "who it is, in English",
    "zh": "who it is, in Chinese",
    "ordinary": "ordinary questions",
}


def _direction(gain: Mapping[str, Any]) -> str:
    return "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "undecided"


#: what a comparison tells of costs: its key in a side, and how it is called
COSTS = (
    ("size_bytes", "on disk"),
    ("prefill_tokens_per_s", "reading, tokens/s"),
    ("decode_tokens_per_s", "writing, tokens/s"),
    ("peak_bytes", "memory at most"),
    ("load_s", "seconds to load"),
)


def lines(report: Mapping[str, Any]) -> list[str]:
    """The answer in a few lines for the terminal.

    cria@1 against smollm2@1
      better:     identity …
      worse:      perplexity (zh) −1.5 % (−2.2 … −0.9)
      undecided:  mmlu −0.5 points (−3.1 … +2.1; 3.8 would have been seen)
    """
    told = [f"{report['after']['ref']} against {report['before']['ref']}"]
    for direction, gains in answer(report).items():
        told += [f"  {direction + ':':<11} {_shown(one)}" for one in gains]
    for name, one in report.get("tasks", {}).items():
        counts = one.get("mcnemar")
        beside = f"; won {counts['won']}, lost {counts['lost']}" if counts else ""
        told.append(
            f"  {name}: {one['metric'].replace('_', ' ')} {100 * one['before']['value']:.1f} → "
            f"{100 * one['after']['value']:.1f} %, {one['items']:,} questions{beside}"
        )
    for key, label in COSTS:
        if key not in report["after"]:  # speed was not measured
            continue
        old, new = (report[side][key] for side in ("before", "after"))
        shown = human_bytes if key.endswith("bytes") else _number
        told.append(f"  {label}: {shown(old)} → {shown(new)}")
    if sum(map(len, answer(report).values())) > 1:
        told.append("  intervals are of 95 %: of twenty true zeros one looks like a difference")
    return told


def line(report: Mapping[str, Any]) -> str:
    """The same in one: cria-merge@1 against cria-tune@1: perplexity (en) +0.0 % (−0.1 … +0.1), …"""
    told = [_shown(one) for gains in answer(report).values() for one in gains]
    size = human_bytes(report["after"]["size_bytes"])
    against = f"{report['after']['ref']} against {report['before']['ref']}"
    return f"{against}: {', '.join(told)}; {size}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _shown(gain: Mapping[str, Any]) -> str:
    unit = " points" if "detectable" in gain else " %"
    text = (
        f" {100 * gain['value']:+.1f}{unit} ({100 * gain['low']:+.1f} … {100 * gain['high']:+.1f}"
    )
    if "detectable" in gain and gain["low"] <= 0 <= gain["high"]:
        text += f"; {100 * gain['detectable']:.1f} would have been seen four times of five"
    return f"{gain['what']}{text.replace('-', '−')})"
