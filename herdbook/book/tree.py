"""The pedigree, drawn for a terminal or as plain data.

cria@1  model 4f1c…  «Quantise»  84.1 MB  identity 97 %
└── cria-merge@1 …
    ├── smollm2@1 …
    └── cria-tune@1 …
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from herdbook.book.book import Artifact, Book

if TYPE_CHECKING:
    from rich.tree import Tree

COLOURS = {"model": "green", "adapter": "cyan", "dataset": "yellow", "report": "magenta"}


def human_bytes(size: float) -> str:
    """1536 → «1.5 kB»."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def human_metric(name: str, value: Any) -> str:
    """«identity_en 97.2 %», «max_bytes 1.5 GB»: shares and sizes in their usual clothes."""
    label = name.replace("_", " ")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{label} {value}"
    if name.endswith("_bytes"):
        return f"{label.removesuffix(' bytes')} {human_bytes(value)}"
    if name.endswith("_share"):
        return f"{label.removesuffix(' share')} {100 * value:.1f} %"
    return f"{label} {value:,}" if isinstance(value, int) else f"{label} {value:,.4g}"


def reports(book: Book, artifact: Artifact) -> Iterator[Artifact]:
    """The reports made of `artifact` as the one to be judged: their setting `after`, or `model`."""
    for child in book.children(artifact):
        judged = (child.config.get("after"), child.config.get("model"))
        if child.kind == "report" and artifact.id in judged:
            yield child


def to_mapping(book: Book, artifact: Artifact) -> dict[str, Any]:
    """The family as nested plain data, for --json."""
    return {
        "ref": artifact.ref,
        "id": artifact.id,
        "kind": artifact.kind,
        "step": artifact.step,
        "metrics": dict(artifact.metrics),
        "reports": [
            {"ref": report.ref, "metrics": dict(report.metrics)}
            for report in reports(book, artifact)
        ],
        "parents": [to_mapping(book, parent) for parent in book.parents(artifact)],
    }


def _metrics(metrics: Mapping[str, Any]) -> str:
    return ", ".join(human_metric(name, value) for name, value in metrics.items())


def draw(book: Book, artifact: Artifact) -> Tree:
    """The family as a rich tree: the child on top, its parents below it."""
    from rich.tree import Tree

    seen: set[str] = set()

    def node(one: Artifact, tree: Tree | None) -> Tree:
        from rich.text import Text

        label = Text()
        label.append(one.ref, style=f"bold {COLOURS.get(one.kind, 'white')}")
        label.append(f"  {one.kind} {one.short[:8]}", style="dim")
        label.append(f"  «{one.step}»  {human_bytes(one.size_bytes)}")
        again = one.id in seen
        if one.metrics and not again:
            label.append(f"\n{_metrics(one.metrics)}", style="dim")
        if not again:
            for report in reports(book, one):
                label.append(f"\n{report.ref}: ", style="magenta")
                label.append(_metrics(report.metrics))
        branch = Tree(label) if tree is None else tree.add(label)
        if again and one.parents:
            branch.add(Text("… as above", style="dim"))
        seen.add(one.id)
        if not again:
            for parent in book.parents(one):
                node(parent, branch)
        return branch

    return node(artifact, None)
