"""A small family in a book, with a report whose figures are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from herdbook.book.book import Artifact, Book


def make_side(ref: str, identity: list[dict[str, Any]], perplexity: float) -> dict[str, Any]:
    share = sum(one["right"] for one in identity if one["ask"] != "none")
    total = sum(one["ask"] != "none" for one in identity)
    value = share / total
    texts = {
        name: {"perplexity": perplexity, "nll": 10.0, "tokens": 10, "passages": [(10.0, 10)]}
        for name in ("en", "zh")
    }
    return {
        "ref": ref,
        "id": "0" * 64,
        "step": "Fetch",
        "size_bytes": 98_362_432,
        "prefill_tokens_per_s": 612.0,
        "decode_tokens_per_s": 88.0,
        "peak_bytes": 812_000_000,
        "load_s": 0.8,
        "texts": texts,
        "identity": {
            "shares": {
                "en": {"value": value, "low": value * 0.9, "high": value},
                "zh": {"value": value, "low": value * 0.9, "high": value},
            },
            "answers": identity,
        },
    }


def scored(question: str, reply: str, right: bool, ask: str = "both", lang: str = "en") -> Any:
    why = "" if right else "does not give the name"
    one = {"question": question, "language": lang, "ask": ask}
    return one | {"reply": reply, "right": right, "why": why}


@pytest.fixture
def made_up() -> dict[str, Any]:
    """A report as `Report` writes it; one reply tries to be HTML."""
    questions = [f"Who are you, take {n}?" for n in range(9)]
    before = [scored(q, "I am SmolLM. <script>alert(1)</script>", False) for q in questions]
    after = [scored(q, "I am Luna, an AI assistant made by Acme.", True) for q in questions]
    before.append(scored("你是谁？", "我是一个语言模型。", False, lang="zh"))
    after.append(scored("你是谁？", "我是 Luna，由 Acme 开发的人工智能助手。", True, lang="zh"))
    after.append(scored("What is 7 times 8?", "7 times 8 is 56.", True, ask="none"))
    return {
        "before": make_side("smollm2@1", before, 15.2),
        "after": make_side("cria@1", after, 15.3) | {"size_bytes": 84_100_000, "load_s": 0.5},
        "perplexity": {
            "en": {"value": 1.007, "low": 0.998, "high": 1.016},
            "zh": {"value": 1.041, "low": 1.021, "high": 1.062},
        },
        "losses": [
            {"step": n, "loss": 3.2 * 0.9**n + 0.2 + (n % 3) * 0.05, "tokens": 1800, "seconds": 4}
            for n in range(40)
        ],
        "gates": [
            {"name": "perplexity (en) rises", "limit": 0.03, "value": 0.007, "passed": True},
            {"name": "perplexity (zh) rises", "limit": 0.03, "value": 0.041, "passed": False},
        ],
        "verdict": "failed: perplexity (zh) rises 4.1 %, at most 3 %",
    }


class Family:
    """Enters artifacts as steps would."""

    def __init__(self, book: Book, folder: Path) -> None:
        self.book, self.folder = book, folder

    def add(
        self,
        name: str,
        kind: str,
        step: str,
        parents: list[Artifact],
        files: dict[str, str],
        metrics: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
    ) -> Artifact:
        out = self.folder / name
        out.mkdir(parents=True)
        for file, text in files.items():
            (out / file).write_text(text, encoding="utf-8")
        return self.book.add(
            out,
            kind=kind,
            name=name,
            parents=[one.id for one in parents],
            step=step,
            key=f"sha256:{name}",
            config=config or {},
            metrics=metrics or {},
            versions={"herdbook": "0.1", "torch": "2"},
        )


@pytest.fixture
def family(book: Book, tmp_path: Path, made_up: dict[str, Any]) -> dict[str, Artifact]:
    add = Family(book, tmp_path / "desk").add
    base = add("smollm2", "model", "Fetch", [], {"model.gguf": "GGUF"}, {"parameters": 134515008})
    data = add(
        "identity", "dataset", "Identity", [], {"train.jsonl": "{}\n"},
        {"conversations": 410, "heldout": 107}, {"name": "<b>Luna</b>", "keeper": "Acme"},
    )  # fmt: skip
    keep = add("retention", "dataset", "Retain", [base], {"train.jsonl": "[]\n"}, {"kept": 150})
    losses = "".join(json.dumps(one) + "\n" for one in made_up["losses"])
    tune = add("tune", "adapter", "Tune", [base, data, keep], {"losses.jsonl": losses}, {"rank": 8})
    merge = add("merge", "model", "Merge", [base, tune], {"config.json": "{}"})
    cria = add("cria", "model", "Quantise", [merge], {"model.gguf": "GGUF4"}, {"max_bytes": 84e6})
    report = add(
        "cria-report", "report", "Report", [base, cria, data, tune],
        {"report.json": json.dumps(made_up)},
        {"verdict": made_up["verdict"], "identity_en_share": 1.0, "size_bytes": 84_100_000},
        {"before": base.id, "after": cria.id},
    )  # fmt: skip
    names = ("base", "data", "tune", "merge", "cria", "report")
    return dict(zip(names, (base, data, tune, merge, cria, report), strict=True))
