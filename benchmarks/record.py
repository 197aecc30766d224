"""What a benchmark measured: one JSON line a claim on stdout, and a table in RESULTS.md.

    {"claim": "decode, one chat", "unit": "tokens/s", "ours": 90.1, "peer": 60.0,
     "peer_name": "llama.cpp Q4_0", "ratio": 1.502, "conditions": {"how": "128 tokens …", …}}

`ratio` is above 1 where ours is better, whatever the unit. A claim without its conditions (machine,
versions, number format, command, date, and how busy the machine was) is worth nothing, so they are
in every line and under every table.

Each script owns one section of RESULTS.md, between two markers. Everything else in the file, other
sections and what people wrote by hand, stays as it is.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from herdbook.doctor import examine
from herdbook.files.atomic import write_text

RESULTS = Path(__file__).with_name("RESULTS.md")
#: every contestant gets as many
THREADS = 2
#: runnable processes per core, before the start, from which on figures are not to be trusted
BUSY = 0.5

TITLE = """# Benchmarks

Ours and the peers on the same work, in one run, on the same machine: `make bench`. The tables are
written by the scripts beside this file. Ratios above 1 mean that ours is better.
"""


@dataclass(frozen=True)
class Claim:
    """One comparison. `how` says what was done, as exactly as a repetition needs."""

    claim: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    how: str
    more_is_better: bool = True

    @property
    def ratio(self) -> float:
        """How many times better ours is."""
        better, worse = (self.ours, self.peer) if self.more_is_better else (self.peer, self.ours)
        return better / worse

    def to_mapping(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "claim": self.claim,
            "unit": self.unit,
            "ours": _rounded(self.ours),
            "peer": _rounded(self.peer),
            "peer_name": self.peer_name,
            "ratio": _rounded(self.ratio),
            "conditions": {"how": self.how, **conditions},
        }


class Recorder:
    """Takes claims as they come; `write` puts them into RESULTS.md once all are there."""

    def __init__(self, section: str, conditions: Mapping[str, Any]) -> None:
        self.section, self.conditions = section, dict(conditions)
        self.claims: list[Claim] = []

    def add(self, claim: Claim) -> None:
        self.claims.append(claim)
        line = json.dumps(claim.to_mapping(self.conditions), ensure_ascii=False)
        print(line, flush=True)

    def write(self, path: Path = RESULTS) -> None:
        text = path.read_text(encoding="utf-8") if path.exists() else TITLE
        write_text(path, replaced(text, self.section, table(self.claims, self.conditions)))
        say(f"wrote {path}")


def conditions(packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """The machine, the versions, the command. packages: the peers' distributions."""
    found = examine()
    load = os.getloadavg()[0]
    cores = os.cpu_count() or 1
    if load / cores > BUSY:
        say(f"this machine is busy (load {load:.1f} on {cores} cores): the figures will be wrong")
    ours = ("torch", "numpy", "tokenizers")
    versions = {name: metadata.version(name) for name in (*ours, *packages)}
    return {
        "processor": found["processor"],
        "instruction sets": found["instruction sets"],
        "cores": cores,
        "threads": THREADS,
        "memory": found["memory"],
        "load before": round(load, 2),
        "herdbook": found["version of herdbook"],
        "python": platform.python_version(),
        **versions,
        **more,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def table(claims: Sequence[Claim], conditions: Mapping[str, Any]) -> str:
    """The section's Markdown: a row a claim, then how each was measured, then the conditions."""
    lines = ["| claim | unit | ours | peer | peer's name | ratio |", "|---|---|--:|--:|---|--:|"]
    for one in claims:
        lines.append(
            f"| {one.claim} | {one.unit} | {shown(one.ours)} | {shown(one.peer)} "
            f"| {one.peer_name} | {one.ratio:.2f} |"
        )
    lines += ["", "How it was measured:", ""]
    lines += [f"- {one.claim}, {one.peer_name}: {one.how}." for one in claims]
    lines += ["", "Conditions: " + "; ".join(f"{k}: {v}" for k, v in conditions.items()) + "."]
    return "\n".join(lines)


def markers(section: str) -> tuple[str, str]:
    """The lines that enclose a section."""
    return (
        f"<!-- {section}: written by benchmarks/{section}.py; what you change here is lost -->",
        f"<!-- {section}: end -->",
    )


def replaced(text: str, section: str, body: str) -> str:
    """The text with the section's body exchanged; a text that has no such section gets it at its end.

    >>> old = replaced("# Mine\\n", "engine", "| 1 |")
    >>> replaced(old, "engine", "| 2 |") == old.replace("| 1 |", "| 2 |")
    True
    """
    begin, end = markers(section)
    counts = text.count(begin), text.count(end)
    if counts == (0, 0):
        return f"{text.rstrip()}\n\n## {section}\n\n{begin}\n{body}\n{end}\n".lstrip()
    start, stop = text.find(begin), text.find(end)
    if counts != (1, 1) or start > stop:
        raise SystemExit(
            f"RESULTS.md: the markers of section {section!r} are not one pair\n"
            f"  next: put back one line {begin!r} and, below it, one line {end!r}"
        )
    return f"{text[:start]}{begin}\n{body}\n{text[stop:]}"


def shown(value: float) -> str:
    """The figures that matter.

    >>> shown(1234.5), shown(43.21), shown(0.4567)
    ('1,234', '43.2', '0.457')
    """
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 3
    return f"{value:,.{digits}f}"


def spread(values: Sequence[float]) -> tuple[float, str]:
    """Median, and the words for it.

    >>> spread([3.0, 1.0, 2.0])
    (2.0, 'median of 3, from 1.000 to 3.000')
    """
    middle = statistics.median(values)
    if len(values) == 1:
        return middle, "one run"
    return middle, f"median of {len(values)}, from {shown(min(values))} to {shown(max(values))}"


def say(line: str) -> None:
    """Progress, apart from the JSON lines."""
    print(line, file=sys.stderr, flush=True)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
