"""The page of two models side by side: is the one better, at what, by how much, at what cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from herdbook.book.tree import human_bytes
from herdbook.evaluation import charts
from herdbook.evaluation.answer import answer
from herdbook.evaluation.html import badge, both, document, percent, quantity, section

#: examples shown at once for each language; the others unfold
SHOWN = 5


def report_page(report: Mapping[str, Any]) -> str:
    """The report alone, as it stands in its own artifact."""
    title = f"{report['after']['ref']}: {report['before']['ref']} → {report['after']['ref']}"
    head = f"<header><h1>{escape(report['after']['ref'])}</h1>{badge(report['verdict'])}</header>"
    return document(title, [head, *sections(report)])


def sections(report: Mapping[str, Any]) -> list[str]:
    before, after = report["before"], report["after"]
    parts = [_cards(report), _answer(report)]
    if report.get("tasks"):
        parts.append(section(both("Tasks", "任务"), _tasks(report)))
    parts.append(section(both("Before and after", "前后对比"), _comparison(report)))
    if after["identity"]["answers"]:
        parts.append(
            section(
                both(
                    "Who are you? Asked in wordings never trained on",
                    "你是谁？用从未训练过的问法来问",
                ),
                _answers(before["identity"]["answers"], after["identity"]["answers"]),
            )
        )
    parts.append(losses_section(report.get("losses", [])))
    return parts


def _cards(report: Mapping[str, Any]) -> str:
    """The few figures that most people came for."""
    before, after = report["before"], report["after"]
    cards = []
    labels = {
        "en": both("knows who it is, in English", "知道自己是谁（英文）"),
        "zh": both("knows who it is, in Chinese", "知道自己是谁（中文）"),
        "ordinary": both("ordinary questions left alone", "普通问题不受影响"),
    }
    for name, share in after["identity"]["shares"].items():
        was = before["identity"]["shares"].get(name)
        note = (
            both(f"before: {percent(was['value'])}", f"之前：{percent(was['value'])}")
            if was
            else ""
        )
        cards.append((percent(share["value"]), labels.get(name, escape(name)), note))
    for name, ratio in report["perplexity"].items():
        note = f"{100 * (ratio['low'] - 1):+.1f} … {100 * (ratio['high'] - 1):+.1f} %"
        label = both(f"perplexity, {escape(name)}", f"困惑度（{escape(name)}）")
        cards.append((f"{100 * (ratio['value'] - 1):+.1f} %", label, note))
    cards.append(
        (
            human_bytes(after["size_bytes"]),
            both("on disk", "磁盘占用"),
            both(
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


def _answer(report: Mapping[str, Any]) -> str:
    """Better at what, worse at what, and of what it is not known."""
    titles = {
        "better": both("shown to be better", "确有提高"),
        "worse": both("shown to be worse", "确有下降"),
        "undecided": both("no difference shown", "未见差异"),
    }
    rows = [
        f"<tr><th>{titles[direction]}</th><td>{escape(', '.join(one['what'] for one in gains))}</td></tr>"
        for direction, gains in answer(report).items()
        if gains
    ]
    return section(
        both("Did it get better?", "变好了吗？"), f'<table class="facts">{"".join(rows)}</table>'
    )


def _tasks(report: Mapping[str, Any]) -> str:
    """Each task: both sides, the paired difference, and the smallest that would have been seen."""
    limits = {gate["name"]: gate["limit"] for gate in report.get("gates", [])}
    rows = []
    for name, one in report["tasks"].items():
        gain, counts = one["difference"], one.get("mcnemar")
        limit = -limits.get(f"{name} drops", 0.0)
        notes = [both(f"{one['items']:,} questions", f"{one['items']:,} 题")]
        if counts:
            won, lost = counts["won"], counts["lost"]
            notes.append(both(f"won {won}, lost {lost}", f"新对 {won}，新错 {lost}"))
        if one["detectable"]:
            seen = f"{100 * one['detectable']:.1f}"
            notes.append(
                both(f"from {seen} points on it would be seen", f"差 {seen} 分以上才看得出")
            )
        rows.append(
            f"<tr><th>{escape(name)}<br><small>{escape(one['metric'])} · {' · '.join(notes)}</small></th>"
            f'<td class="n">{100 * one["before"]["value"]:.1f}</td>'
            f'<td class="n">{100 * one["after"]["value"]:.1f}</td>'
            f"<td>{charts.change(gain['value'], gain['low'], gain['high'], limit, up=True)}</td>"
            f'<td class="n">{100 * gain["value"]:+.1f} ({100 * gain["low"]:+.1f} … '
            f"{100 * gain['high']:+.1f})</td></tr>"
        )
    head = (
        f"<tr><th></th><th>{both('before', '之前')}</th><th>{both('after', '之后')}</th><th></th>"
        f"<th>{both('points', '分')}</th></tr>"
    )
    note = both(
        "Shares in percent; the difference with its 95 % interval, paired question by question. Higher is "
        "better; the dashed line is the gate.",
        "百分比；差值及其 95% 区间（逐题配对）。越高越好；虚线为门限。",
    )
    return f'<table class="compare">{head}{"".join(rows)}</table><p class="note">{note}</p>'


def _comparison(report: Mapping[str, Any]) -> str:
    before, after = report["before"], report["after"]
    limits = {gate["name"]: gate["limit"] for gate in report.get("gates", [])}
    rows: list[tuple[str, str, str, str]] = []
    for name, ratio in report["perplexity"].items():
        old, new = (one["texts"][name]["perplexity"] for one in (before, after))
        limit = limits.get(f"perplexity ({name}) rises", 0.0)
        picture = charts.change(ratio["value"] - 1, ratio["low"] - 1, ratio["high"] - 1, limit)
        label = both(f"perplexity, {escape(name)}", f"困惑度，{escape(name)}")
        rows.append((label, f"{old:.2f}", f"{new:.2f}", picture))
    for key, label in (
        ("prefill_tokens_per_s", both("reading, tokens/s", "读入，词元/秒")),
        ("decode_tokens_per_s", both("writing, tokens/s", "生成，词元/秒")),
        ("size_bytes", both("size on disk", "磁盘占用")),
        ("peak_bytes", both("memory at most", "内存峰值")),
        ("load_s", both("time to load", "加载时间")),
    ):
        old, new = quantity(key, before[key]), quantity(key, after[key])
        rows.append((label, old, new, charts.bars(before[key], after[key], (old, new))))
    head = (
        f"<tr><th></th><th>{both('before', '之前')}<br><small>{escape(before['ref'])}</small></th>"
        f"<th>{both('after', '之后')}<br><small>{escape(after['ref'])}</small></th><th></th></tr>"
    )
    lines = (
        f'<tr><th>{label}</th><td class="n">{old}</td><td class="n">{new}</td><td>{picture}</td></tr>'
        for label, old, new, picture in rows
    )
    note = both(
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
        "en": both("English", "英文"),
        "zh": both("Chinese", "中文"),
        "ordinary": both("Ordinary questions: the name must not appear", "普通问题：不应出现名字"),
    }
    head = (
        f"<tr><th>{both('question', '问题')}</th><th>{both('before', '之前')}</th>"
        f"<th>{both('after', '之后')}</th></tr>"
    )
    parts = []
    for name, rows in groups.items():
        rest = "".join(rows[SHOWN:])
        parts.append(f"<h3>{titles.get(name, escape(name))}</h3>")
        parts.append(f'<table class="answers">{head}{"".join(rows[:SHOWN])}</table>')
        if rest:
            more = both(f"{len(rows) - SHOWN} more", f"另外 {len(rows) - SHOWN} 个")
            parts.append(
                f'<details><summary>{more}</summary><table class="answers">{rest}</table></details>'
            )
    return "".join(parts)


def _reply(one: Mapping[str, Any]) -> str:
    mark = '<i class="ok">✓</i>' if one["right"] else '<i class="no">✗</i>'
    why = f"<small>{escape(one['why'])}</small>" if one["why"] else ""
    return f"{mark} {escape(one['reply'])}{why}"


def losses_section(losses: Iterable[Mapping[str, Any]]) -> str:
    tokens, points = 0.0, []
    for one in losses:
        tokens += float(one.get("tokens", 1))
        points.append((tokens, float(one["loss"])))
    picture = charts.loss_curve(points)
    if not picture:
        return ""
    note = both(
        "Loss a token, over the tokens trained so far: every step, and its mean. Of rows to keep it is "
        "their weighted divergence from the base.",
        "每个词元的损失，随已训练词元数变化：每一步及其平均。保留样本的损失是与基座的加权散度。",
    )
    return section(
        both("Loss", "损失曲线"),
        f'<figure class="wide">{picture}</figure><p class="note">{note}</p>',
    )
