"""The step that asks whether what a model writes is healthy, over prompts in two languages.

    health.json     {"prompts": 40, "model": {"ref", "id"}, "data_hash", "samples", "max_tokens", "all":
                     {"looping": {"value", "low", "high"}, …}, "en": {…}, "zh": {…}, "loops": […], …}
    replies.jsonl   a row for each prompt: its greedy reply, its samples, and what was found in them

Of each set of prompts (all, and those in each language):

    distinct_1 … 3     distinct n-grams over all n-grams of the greedy replies
    repeated_4grams    mean share of a reply's 4-grams that stood in it before
    looping            share of replies that end in the same text over and over
    unfinished, empty  shares of replies cut at max_tokens, and of those without a word
    self_consistency   mean token F1 of pairs of samples of one prompt, at temperature 0.7
    faithfulness       mean share of what a reply mentions that its passages say (faithfulness.py)

A user's file has rows of prompt (or question), and perhaps id and passages, a list of texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.book import Artifact
from herdbook.book.hashing import digest
from herdbook.book.step import Bench, Input, Step, require
from herdbook.data import rows as data
from herdbook.data.records import Message
from herdbook.data.teacher import Ask, Teacher
from herdbook.errors import ConfigError, DataError
from herdbook.evaluation.answered import Answered
from herdbook.evaluation.judging.teachers import opened
from herdbook.evaluation.marks import health
from herdbook.evaluation.marks.faithfulness import faithfulness
from herdbook.evaluation.marks.words import language
from herdbook.evaluation.statistics import wilson
from herdbook.evaluation.tasks.results import figure
from herdbook.files.atomic import sha256_once, write_json, write_text

RESULT, REPLIES = "health.json", "replies.jsonl"
TEMPERATURE = 0.7
#: prompts asked at once; loops and inventions that are shown
BATCH, EXAMPLES = 16, 5
_SHIPPED = [Path(__file__).parent / "text" / f"health.{one}.jsonl" for one in ("en", "zh")]
_FRAMES = {
    "zh": "请只根据下面的材料回答。\n\n{passages}\n\n问题：{prompt}",
    "en": "Answer from the passages alone.\n\n{passages}\n\nQuestion: {prompt}",
}
_NAMES = {"zh": "材料", "en": "Passage "}


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str
    passages: tuple[str, ...] = ()

    @property
    def language(self) -> str:
        return "zh" if language(self.text) == "zh" else "en"

    @property
    def asked(self) -> str:
        """The user's turn: the passages, where there are some, before the question."""
        if not self.passages:
            return self.text
        name = _NAMES[self.language]
        shown = "\n\n".join(f"{name}{n}: {one}" for n, one in enumerate(self.passages, 1))
        return _FRAMES[self.language].format(passages=shown, prompt=self.text)


@dataclass(frozen=True)
class Health(Step):
    """Look for loops, repetition, disagreement with itself, and inventions in what a model writes."""

    kind: ClassVar[str] = "report"
    model: Input = ""
    prompts: str = ""  # a file of prompts; empty: Herdbook's own, 20 in each language
    limit: int = 0  # so many prompts, spread evenly over the file; 0: all
    samples: int = 3  # of each prompt, for self-consistency
    max_tokens: int = 256
    seed: int = 0

    def check(self) -> None:
        require(self, "model")
        for name, least in (("limit", 0), ("samples", 2), ("max_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)}", rule=f"must be {least} or more")
        self.asked()

    def fingerprint(self) -> dict[str, str]:
        return {path.name: sha256_once(path) for path in self.files()}

    def files(self) -> list[Path]:
        return [Path(self.prompts).expanduser()] if self.prompts else _SHIPPED

    def asked(self) -> list[Prompt]:
        found = [one for path in self.files() for one in read(path)]
        some = self.limit if 0 < self.limit < len(found) else len(found)
        return [found[place * len(found) // some] for place in range(some)]

    def make(self, bench: Bench) -> dict[str, Any]:
        asked, artifact = self.asked(), bench.artifact("model")
        batches = [asked[n : n + BATCH] for n in range(0, len(asked), BATCH)]
        teacher = opened(artifact.id, book=bench.book)
        answered = Answered(bench.work / REPLIES, batches)
        rows = answered.fill(partial(self._replies, teacher), bench.progress, "health")
        result = {
            "model": {"ref": artifact.ref, "id": artifact.id},
            "data_hash": digest(self.fingerprint()),
            "samples": self.samples,
            "max_tokens": self.max_tokens,
            **summarise(rows),
        }
        write_json(bench.out / RESULT, result)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(bench.out / REPLIES, "".join(lines))
        every = result["all"]
        shares = {f"{name}_share": one["value"] for name, one in every.items()}
        return {"prompts": len(rows), **shares}

    def _replies(self, teacher: Teacher, batch: Sequence[Prompt]) -> list[dict[str, Any]]:
        """The rows of a batch: all its greedy replies and samples in one call."""
        drawn = [(0.0, self.seed), *((TEMPERATURE, self.seed + n) for n in range(self.samples))]
        asks = [
            Ask((Message("user", one.asked),), self.max_tokens, temperature, seed)
            for one in batch
            for temperature, seed in drawn
        ]
        answers, rows = iter(teacher.generate(asks)), []
        for one in batch:
            first, *others = (next(answers) for _ in drawn)
            loop = health.loop(first.text)
            row = {
                "id": one.id,
                "language": one.language,
                "prompt": one.text,
                "reply": first.text,
                "finished": first.finished,
                "samples": [other.text for other in others],
                "repeated_4grams": health.repeated(first.text),
                "self_consistency": health.self_consistency([two.text for two in others]).f1,
                "loop": asdict(loop) if loop else None,
            }
            if one.passages:
                kept = faithfulness(first.text, one.passages)
                row |= {"faithfulness": kept.score, "unsupported": list(kept.unsupported)}
            rows.append(row)
        return rows


def read(path: Path) -> list[Prompt]:
    """The prompts of a file. Errors: DataError names the row that is none."""
    expected = "where rows of prompt (or question), and perhaps passages, were expected"
    found: dict[str, Prompt] = {}
    for number, (_, place, row) in enumerate(data.rows(path, expected), start=1):
        where = f"{path}, {place}:"
        if not isinstance(row, Mapping):
            raise DataError(f"{where} {row!r:.60}", rule=expected, next="mend that row")
        text, passages = row.get("prompt", row.get("question")), row.get("passages", [])
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where} {row!r:.60}", rule="lacks a prompt", next="mend that row")
        if not isinstance(passages, list) or not all(
            isinstance(one, str) and one.strip() for one in passages
        ):
            raise DataError(
                f"{where} passages {passages!r:.60}",
                rule="are no list of texts",
                next="mend that row",
            )
        one = Prompt(str(row.get("id", number)), text, tuple(passages))
        if one.id in found:
            raise DataError(
                f"{where} id {one.id!r}", rule="is an earlier row's already", next="mend that row"
            )
        found[one.id] = one
    if not found:
        raise DataError(f"{path} holds no row", rule=expected, next="give another file")
    return [*found.values()]


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all rows and of each language, each with its interval, and examples."""
    found: dict[str, Any] = {"prompts": len(rows), "all": _figures(rows)}
    languages = sorted({row["language"] for row in rows})
    if len(languages) > 1:
        found |= {
            name: _figures([row for row in rows if row["language"] == name]) for name in languages
        }
    looping = [row for row in rows if row["loop"]]
    invented = [row for row in rows if row.get("unsupported")]
    return found | {
        "loops": [
            {"id": row["id"], "prompt": row["prompt"], **row["loop"]} for row in looping[:EXAMPLES]
        ],
        "unsupported": [
            {"id": row["id"], "prompt": row["prompt"], "words": row["unsupported"]}
            for row in sorted(invented, key=lambda row: row["faithfulness"])[:EXAMPLES]
        ],
    }


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    replies, total = [row["reply"] for row in rows], len(rows)
    found = {f"distinct_{n}": health.distinct(replies, n).to_json() for n in (1, 2, 3)}
    for name in ("repeated_4grams", "self_consistency"):
        found[name] = figure([row[name] for row in rows])
    counts = {
        "looping": sum(row["loop"] is not None for row in rows),
        "unfinished": sum(not row["finished"] for row in rows),
        "empty": sum(not reply.strip() for reply in replies),
    }
    found |= {name: wilson(count, total).to_json() for name, count in counts.items()}
    kept = [row["faithfulness"] for row in rows if row.get("faithfulness") is not None]
    return found | ({"faithfulness": figure(kept) | {"n": len(kept)}} if kept else {})


def result_of(report: Artifact) -> dict[str, Any]:
    """The figures of a report."""
    found: dict[str, Any] = json.loads((report.path / RESULT).read_text(encoding="utf-8"))
    return found


def lines(figures: Mapping[str, Any]) -> list[str]:
    """A report in a few lines for the terminal."""
    rows = [f"health: {figures['prompts']} prompts, {figures['samples']} samples of each"]
    sets = [name for name in ("all", "en", "zh") if name in figures]
    for name in figures["all"]:
        shown = [
            f"{one} {100 * value['value']:.1f} % ({100 * value['low']:.1f} … "
            f"{100 * value['high']:.1f})"
            for one in sets
            if (value := figures[one].get(name))
        ]
        rows.append(f"  {name.replace('_', ' ')}: {', '.join(shown)}")
    for one in figures["loops"]:
        rows.append(f"  loops on {one['prompt']!r:.60}: {one['times']:.0f} × {one['cycle']!r:.80}")
    for one in figures["unsupported"]:
        words = ", ".join(one["words"])
        rows.append(f"  not in the passages of {one['prompt']!r:.60}: {words:.80}")
    return rows
