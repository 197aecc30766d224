"""What all pages share: the document with its style and its switch of language, labels, figures.

One self-contained HTML file each: no script from elsewhere, no font, no picture but inline SVG. Labels
stand in English and Chinese; the button, or ``?lang=zh`` in the address, chooses. All that a model, a
user or a file has written is foreign text and escaped.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from herdbook.book.tree import human_bytes

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
_SCRIPT = (
    "const r=document.documentElement,set=l=>{r.lang=l};"
    "set(new URLSearchParams(location.search).get('lang')||r.lang);"
    "document.getElementById('lang').onclick=()=>set(r.lang==='zh'?'en':'zh');"
)


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


def both(english: str, chinese: str) -> str:
    """A label in both languages; the page shows one. Takes HTML: escape what is foreign."""
    return f'<span lang="en">{english}</span><span lang="zh">{chinese}</span>'


def section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def badge(verdict: str) -> str:
    passed = verdict == "passed"
    label = both("passed", "通过") if passed else escape(verdict)
    return f'<span class="verdict {"ok" if passed else "no"}">{label}</span>'


def kind(kind: str) -> str:
    names = {
        "dataset": "数据集",
        "tokenizer": "分词器",
        "model": "模型",
        "adapter": "适配器",
        "report": "报告",
        "index": "索引",
    }
    return both(escape(kind), names.get(kind, escape(kind)))


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def quantity(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return human_bytes(value)
    return f"{value:.2f} s" if name.endswith("_s") and "per" not in name else f"{value:,.0f}"
