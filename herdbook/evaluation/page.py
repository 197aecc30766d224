"""Pages to look at: an artifact with its pedigree, and the report of a model before and after.

One self-contained HTML file: no script from elsewhere, no font, no picture but inline SVG. Labels
stand in English and Chinese; the button, or ``?lang=zh`` in the address, chooses. All that a model, a
user or a file has written is foreign text and escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from herdbook.book.book import Artifact, Book
from herdbook.book.tree import human_bytes, human_metric, reports
from herdbook.evaluation import charts

#: examples shown at once for each language; the others unfold
SHOWN = 5

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
_SCRIPT = (
    "const r=document.documentElement,set=l=>{r.lang=l};"
    "set(new URLSearchParams(location.search).get('lang')||r.lang);"
    "document.getElementById('lang').onclick=()=>set(r.lang==='zh'?'en':'zh');"
)


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
        body += _report(report)
    else:
        body.append(_losses(_losses_of(artifact, book)))
    body.append(_section(_both("Pedigree", "家谱"), _pedigree(artifact, book)))
    body.append(_facts(artifact))
    return document(artifact.ref, body)


def report_page(report: Mapping[str, Any]) -> str:
    """The report alone, as it stands in its own artifact."""
    title = f"{report['after']['ref']}: {report['before']['ref']} → {report['after']['ref']}"
    head = (
        f"<header><h1>{escape(report['after']['ref'])}</h1>{_verdict(report['verdict'])}</header>"
    )
    return document(title, [head, *_report(report)])


# ------------------------------------------------------------------------------------- the report


def _report(report: Mapping[str, Any]) -> list[str]:
    before, after = report["before"], report["after"]
    parts = [_cards(report)]
    parts.append(_section(_both("Before and after", "前后对比"), _comparison(report)))
    if after["identity"]["answers"]:
        parts.append(
            _section(
                _both(
                    "Who are you? Asked in wordings never trained on",
                    "你是谁？用从未训练过的问法来问",
                ),
                _answers(before["identity"]["answers"], after["identity"]["answers"]),
            )
        )
    parts.append(_losses(report.get("losses", [])))
    return parts


def _cards(report: Mapping[str, Any]) -> str:
    """The few figures that most people came for."""
    before, after = report["before"], report["after"]
    cards = []
    labels = {
        "en": _both("knows who it is, in English", "知道自己是谁（英文）"),
        "zh": _both("knows who it is, in Chinese", "知道自己是谁（中文）"),
        "ordinary": _both("ordinary questions left alone", "普通问题不受影响"),
    }
    for name, share in after["identity"]["shares"].items():
        was = before["identity"]["shares"].get(name)
        note = (
            _both(f"before: {_percent(was['value'])}", f"之前：{_percent(was['value'])}")
            if was
            else ""
        )
        cards.append((_percent(share["value"]), labels.get(name, escape(name)), note))
    for name, ratio in report["perplexity"].items():
        note = f"{100 * (ratio['low'] - 1):+.1f} … {100 * (ratio['high'] - 1):+.1f} %"
        label = _both(f"perplexity, {escape(name)}", f"困惑度（{escape(name)}）")
        cards.append((f"{100 * (ratio['value'] - 1):+.1f} %", label, note))
    cards.append(
        (
            human_bytes(after["size_bytes"]),
            _both("on disk", "磁盘占用"),
            _both(
                f"before: {human_bytes(before['size_bytes'])}",
                f"之前：{human_bytes(before['size_bytes'])}",
            ),
        )
    )
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{value}</b><span>{label}</span><small>{note}</small></div>'
            for value, label, note in cards
        )
        + "</div>"
    )


def _comparison(report: Mapping[str, Any]) -> str:
    before, after = report["before"], report["after"]
    limits = {gate["name"]: gate["limit"] for gate in report.get("gates", [])}
    rows: list[tuple[str, str, str, str]] = []
    for name, ratio in report["perplexity"].items():
        old, new = (one["texts"][name]["perplexity"] for one in (before, after))
        limit = limits.get(f"perplexity ({name}) rises", 0.0)
        picture = charts.change(ratio["value"] - 1, ratio["low"] - 1, ratio["high"] - 1, limit)
        label = _both(f"perplexity, {escape(name)}", f"困惑度，{escape(name)}")
        rows.append((label, f"{old:.2f}", f"{new:.2f}", picture))
    for key, label in (
        ("prefill_tokens_per_s", _both("reading, tokens/s", "读入，词元/秒")),
        ("decode_tokens_per_s", _both("writing, tokens/s", "生成，词元/秒")),
        ("size_bytes", _both("size on disk", "磁盘占用")),
        ("peak_bytes", _both("memory at most", "内存峰值")),
        ("load_s", _both("time to load", "加载时间")),
    ):
        old, new = _quantity(key, before[key]), _quantity(key, after[key])
        rows.append((label, old, new, charts.bars(before[key], after[key], (old, new))))
    head = (
        f"<tr><th></th><th>{_both('before', '之前')}<br><small>{escape(before['ref'])}</small></th>"
        f"<th>{_both('after', '之后')}<br><small>{escape(after['ref'])}</small></th><th></th></tr>"
    )
    lines = (
        f'<tr><th>{label}</th><td class="n">{old}</td><td class="n">{new}</td><td>{picture}</td></tr>'
        for label, old, new, picture in rows
    )
    note = _both(
        "Perplexity: change with its 95 % interval, paired by passage; the dashed line is the gate. "
        "Lower is better.",
        "困惑度：变化及其 95% 区间（按段落配对）；虚线为门限。越低越好。",
    )
    return f'<table class="compare">{head}{"".join(lines)}</table><p class="note">{note}</p>'


def _answers(before: list[Any], after: list[Any]) -> str:
    """Each question with both replies; a few of each language at once, the rest to unfold."""
    old = {(one["language"], one["question"]): one for one in before}
    groups: dict[str, list[str]] = {}
    for one in after:
        was = old.get((one["language"], one["question"]))
        row = (
            f"<tr><td>{escape(one['question'])}</td>"
            f"<td>{_reply(was) if was else ''}</td><td>{_reply(one)}</td></tr>"
        )
        name = one["language"] if one["ask"] != "none" else "ordinary"
        groups.setdefault(name, []).append(row)
    titles = {
        "en": _both("English", "英文"),
        "zh": _both("Chinese", "中文"),
        "ordinary": _both("Ordinary questions: the name must not appear", "普通问题：不应出现名字"),
    }
    head = (
        f"<tr><th>{_both('question', '问题')}</th><th>{_both('before', '之前')}</th>"
        f"<th>{_both('after', '之后')}</th></tr>"
    )
    parts = []
    for name, rows in groups.items():
        rest = "".join(rows[SHOWN:])
        parts.append(f"<h3>{titles.get(name, escape(name))}</h3>")
        parts.append(f'<table class="answers">{head}{"".join(rows[:SHOWN])}</table>')
        if rest:
            more = _both(f"{len(rows) - SHOWN} more", f"另外 {len(rows) - SHOWN} 个")
            parts.append(
                f'<details><summary>{more}</summary><table class="answers">{rest}</table></details>'
            )
    return "".join(parts)


def _reply(one: Mapping[str, Any]) -> str:
    mark = '<i class="ok">✓</i>' if one["right"] else '<i class="no">✗</i>'
    why = f"<small>{escape(one['why'])}</small>" if one["why"] else ""
    return f"{mark} {escape(one['reply'])}{why}"


def _losses(losses: Iterable[Mapping[str, Any]]) -> str:
    tokens, points = 0.0, []
    for one in losses:
        tokens += float(one.get("tokens", 1))
        points.append((tokens, float(one["loss"])))
    picture = charts.loss_curve(points)
    if not picture:
        return ""
    note = _both(
        "Loss a token, over the tokens trained so far: every step, and its mean. Of rows to keep it is "
        "their weighted divergence from the base.",
        "每个词元的损失，随已训练词元数变化：每一步及其平均。保留样本的损失是与基座的加权散度。",
    )
    return _section(
        _both("Loss", "损失曲线"),
        f'<figure class="wide">{picture}</figure><p class="note">{note}</p>',
    )


# ----------------------------------------------------------------------------------- the artifact


def _head(artifact: Artifact, report: Mapping[str, Any] | None) -> str:
    verdict = _verdict(report["verdict"]) if report else ""
    return (
        f"<header><h1>{escape(artifact.ref)}</h1>{verdict}"
        f'<p class="note">{_kind(artifact.kind)} · {escape(artifact.step)} · '
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
            f"<small>{_kind(one.kind)} · {escape(one.step)} · {human_bytes(one.size_bytes)}</small>"
            + "".join(f"<small>{escape(figure)}</small>" for figure in figures)
            + (f"<small>{_both('as drawn above', '同上')}</small>" if again else "")
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
        (_both("Figures", "指标"), dict(_figure(*item) for item in artifact.metrics.items())),
        (_both("Settings", "设置"), artifact.config),
        (_both("Versions", "版本"), artifact.versions),
        (_both("Files", "文件"), artifact.files),
        (_both("Origin", "来源"), {"id": artifact.id, "key": artifact.key, "path": artifact.path}),
    )
    return "".join(
        f"<details{' open' if number < 2 else ''}><summary>{title}</summary><table class=facts>"
        + "".join(
            f"<tr><th>{escape(str(key))}</th><td>{escape(_plain(value))}</td></tr>"
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
    found: dict[str, Any] = json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))
    return found


# ------------------------------------------------------------------------------------ small things


def document(title: str, body: list[str]) -> str:
    """A page of Herdbook's, with its style and its switch of language."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · Herdbook</title><style>{_STYLE}</style></head><body>"
        '<nav><span>Herdbook</span><button id="lang" type="button">'
        '<span lang="en">中文</span><span lang="zh">English</span></button></nav>'
        f"<main>{''.join(body)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _both(english: str, chinese: str) -> str:
    """A label in both languages; the page shows one. Takes HTML: escape what is foreign."""
    return f'<span lang="en">{english}</span><span lang="zh">{chinese}</span>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _verdict(verdict: str) -> str:
    passed = verdict == "passed"
    label = _both("passed", "通过") if passed else escape(verdict)
    return f'<span class="verdict {"ok" if passed else "no"}">{label}</span>'


def _kind(kind: str) -> str:
    names = {
        "dataset": "数据集",
        "tokenizer": "分词器",
        "model": "模型",
        "adapter": "适配器",
        "report": "报告",
        "index": "索引",
    }
    return _both(escape(kind), names.get(kind, escape(kind)))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _quantity(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return human_bytes(value)
    return f"{value:.2f} s" if name.endswith("_s") and "per" not in name else f"{value:,.0f}"
