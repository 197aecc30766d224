"""The page of an artifact: what it is, whether it got better, where it comes from, its settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from herdbook.book.book import Artifact, Book
from herdbook.book.tree import human_bytes, human_metric, reports
from herdbook.evaluation.answer import read_report
from herdbook.evaluation.html import badge, both, document, kind, plain, section
from herdbook.evaluation.report_page import losses_section, sections


def page(artifact: Artifact, book: Book) -> str:
    """The artifact's page: what it is, whether it got better, where it comes from, its settings."""
    judged = (
        artifact
        if artifact.kind == "report"
        else next(filter(_report_of, [*reports(book, artifact)][::-1]), None)
    )
    report = _report_of(judged)
    body = [_head(artifact, report)]
    if report:
        body += sections(report)
    else:
        body.append(losses_section(_losses_of(artifact, book)))
    body.append(section(both("Pedigree", "家谱"), _pedigree(artifact, book)))
    body.append(_facts(artifact))
    return document(artifact.ref, body)


def _head(artifact: Artifact, report: Mapping[str, Any] | None) -> str:
    verdict = badge(report["verdict"]) if report else ""
    return (
        f"<header><h1>{escape(artifact.ref)}</h1>{verdict}"
        f'<p class="note">{kind(artifact.kind)} · {escape(artifact.step)} · '
        f"{human_bytes(artifact.size_bytes)} · {escape(artifact.created[:19].replace('T', ' '))} UTC"
        f" · <code>{escape(artifact.short)}</code></p></header>"
    )


def _pedigree(artifact: Artifact, book: Book) -> str:
    """The child on the left, its parents on the right, as breeders draw it."""
    seen: set[str] = set()

    def node(one: Artifact) -> str:
        again = one.id in seen and one.parents
        seen.add(one.id)
        figures = [] if again else [human_metric(*item) for item in list(one.metrics.items())[:3]]
        card = (
            f'<div class="beast {escape(one.kind)}"><b>{escape(one.ref)}</b>'
            f"<small>{kind(one.kind)} · {escape(one.step)} · {human_bytes(one.size_bytes)}</small>"
            + "".join(f"<small>{escape(figure)}</small>" for figure in figures)
            + (f"<small>{both('as drawn above', '同上')}</small>" if again else "")
            + "</div>"
        )
        parents = [] if again else book.parents(one)
        if not parents:
            return f'<div class="line">{card}</div>'
        nodes = "".join(node(parent) for parent in parents)
        return f'<div class="line">{card}<div class="parents">{nodes}</div></div>'

    return f'<div class="pedigree">{node(artifact)}</div>'


def _facts(artifact: Artifact) -> str:
    tables = (
        (both("Figures", "指标"), dict(_figure(*item) for item in artifact.metrics.items())),
        (both("Settings", "设置"), artifact.config),
        (both("Versions", "版本"), artifact.versions),
        (both("Files", "文件"), artifact.files),
        (both("Origin", "来源"), {"id": artifact.id, "key": artifact.key, "path": artifact.path}),
    )
    return "".join(
        f"<details{' open' if number < 2 else ''}><summary>{title}</summary><table class=facts>"
        + "".join(
            f"<tr><th>{escape(str(key))}</th><td>{escape(plain(value))}</td></tr>"
            for key, value in table.items()
        )
        + "</table></details>"
        for number, (title, table) in enumerate(tables)
        if table
    )


def _figure(name: str, value: Any) -> tuple[str, str]:
    """«size_bytes», 84117312 → «size», «84.1 MB»."""
    label = name.replace("_", " ")
    if isinstance(value, int | float):
        label = label.removesuffix(" bytes").removesuffix(" share")
    return label, human_metric(name, value)[len(label) + 1 :]


def _losses_of(artifact: Artifact, book: Book) -> list[dict[str, Any]]:
    """Its own loss curve, or that of the adapter it was merged from."""
    for one in book.ancestors(artifact):
        path = one.path / "losses.jsonl"
        if path.is_file():
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return []


def _report_of(artifact: Artifact | None) -> dict[str, Any] | None:
    if artifact is None or not (artifact.path / "report.json").is_file():
        return None
    return read_report(artifact)
