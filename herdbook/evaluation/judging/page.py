"""The leaderboard of an arena as a page, in both languages."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from herdbook.evaluation.html import both, document, section


def arena_page(board: Mapping[str, Any], title: str) -> str:
    """`board` is what `arena.leaderboard` gives; names in it are foreign text."""
    rows = board["models"]
    controlled = "controlled" in rows[0]
    names = [
        both("rank", "名次"),
        both("model", "模型"),
        both("rating", "评分"),
        "",
        *([both("at equal length", "同等篇幅")] if controlled else []),
        "Elo",
        both("score", "得分率"),
        both("votes", "票数"),
    ]
    head = "".join(f"<th>{name}</th>" for name in names)
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    lines = []
    for row in rows:
        cells = [
            f"<b>{row['rank']}</b>",
            escape(row["model"]),
            f"{row['rating']:.0f} <small>{row['low']:.0f} … {row['high']:.0f}</small>",
            _whisker(row["rating"], row["low"], row["high"], low, high),
            *([f"{row['controlled']:.0f}"] if controlled else []),
            f"{row['elo']:.0f}",
            f"{100 * row['score']:.0f} %",
            f"{row['votes']:,}",
        ]
        lines.append("<tr>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>")
    table = f'<table class="compare"><tr>{head}</tr>{"".join(lines)}</table>'
    notes = "".join(f'<p class="note">{note}</p>' for note in _notes(board))
    shown = escape(title)
    return document(
        title,
        [
            f"<header><h1>{shown}</h1></header>",
            section(both("Leaderboard", "排行榜"), table + notes),
        ],
    )


def _notes(board: Mapping[str, Any]) -> list[str]:
    notes = [
        both(
            f"{board['votes']:,} anonymous votes, {board['ties']:,} of them ties. Rating: Bradley–Terry, "
            "mean 1000, with its 95 % interval; 400 points more win ten times as often as they lose. "
            "Rank: one more than the models that lie wholly above.",
            f"共 {board['votes']:,} 张匿名票，其中 {board['ties']:,} 张为平局。评分：Bradley–Terry，均值 1000，"
            "附 95% 区间；高出 400 分，胜负比为十比一。名次：区间完全在其上方的模型数加一。",
        )
    ]
    if board["position"]:
        first = board["position"]
        share = f"{100 * first['value']:.0f} %"
        span = f"{100 * first['low']:.0f} … {100 * first['high']:.0f} %"
        notes.append(
            both(
                f"What stood first won {share} of the decided votes ({span}).",
                f"在分出胜负的票中，排在前面的一方胜出 {share}（{span}）。",
            )
        )
    if "length_points" in board:
        points = f"{board['length_points']:+.0f}"
        notes.append(
            both(
                f"Twice the length is worth {points} points; «at equal length» takes that out.",
                f"篇幅加倍相当于 {points} 分；“同等篇幅”一栏已将其扣除。",
            )
        )
    if board["bounded"]:
        notes.append(
            both(
                "Some model won or lost all its votes, and has no finite rating: a tie of weight "
                f"{board['prior']:g} between every two models bounds it.",
                f"有模型全胜或全负，评分没有有限值；已在每两个模型之间加入权重为 {board['prior']:g} 的平局加以限制。",
            )
        )
    if not board["converged"]:
        notes.append(both("The fit did not converge.", "拟合没有收敛。"))
    return notes


def _whisker(value: float, low: float, high: float, left: float, right: float) -> str:
    """A point with its interval on an axis that all rows share."""
    width = max(right - left, 1e-9)
    at = [8 + 224 * (x - left) / width for x in (low, value, high)]
    return (
        '<svg viewBox="0 0 240 16" style="width:240px" role="img" '
        f'aria-label="{low:.0f} to {high:.0f}">'
        f'<line class="whisker good" x1="{at[0]:.1f}" x2="{at[2]:.1f}" y1="8" y2="8"/>'
        f'<circle class="good" cx="{at[1]:.1f}" cy="8" r="5"/></svg>'
    )
