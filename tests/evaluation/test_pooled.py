"""Figures that are no mean of marks: a corpus's BLEU, a micro F1, constraints one by one, pass@k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from herdbook.errors import ConfigError
from herdbook.evaluation.marks import extraction, overlap, scored
from herdbook.evaluation.tasks import results, scoring
from herdbook.evaluation.tasks.step import Evaluate
from herdbook.evaluation.tasks.task import Item, Task

from .toy import toy


def task(*metrics: str, **more: Any) -> Task:
    return Task("made", "", 1, "generate", "x", metrics, prompt="{{ q }}", **more)


def item(id: str, answer: str = "", group: str = "", **extra: Any) -> Item:
    return Item(id, group, "", (), "q", "", answer=answer, extra=extra)


def summarised(one: Task, items: list[Item], *drawn: list[str]) -> dict[str, Any]:
    rows = {seed: scoring.marked(one, items, replies) for seed, replies in enumerate(drawn)}
    for some in rows.values():
        for asked, row in zip(items, some, strict=True):
            row["id"] = asked.id
    return results.summarise(one, items, rows)


REPLIES = ["the cat sat on the mat today", "a dog ran over there now", "rain falls on us", "no"]
WANTED = [
    "the cat sat on the mat",
    "the dog ran over here now",
    "rain falls on the house",
    "yes it is",
]


def test_corpus_bleu_is_not_the_mean_of_sentences() -> None:
    items = [item(str(n), one) for n, one in enumerate(WANTED)]
    found = summarised(task("corpus_bleu", "bleu"), items, REPLIES)
    whole = overlap.bleu(REPLIES, [[one] for one in WANTED]) / 100
    assert found["value"] == pytest.approx(whole) and found["n"] == 4
    assert found["metrics"]["bleu"]["value"] != pytest.approx(whole, rel=0.05)
    assert found["low"] < whole < found["high"] and found["stderr"] > 0
    again = summarised(task("corpus_bleu"), items, REPLIES)
    assert again["metrics"]["corpus_bleu"] == found["metrics"]["corpus_bleu"], "drawn alike"
    twice = summarised(task("corpus_bleu", temperature=1.0), items, REPLIES, WANTED)
    assert twice["seeds"] == {"0": pytest.approx(whole), "1": pytest.approx(1.0)}
    both = overlap.bleu([*REPLIES, *WANTED], [[one] for one in [*WANTED, *WANTED]]) / 100
    assert twice["value"] == pytest.approx(both)


def test_micro_f1_counts_what_cannot_be_read_as_missed() -> None:
    wanted = ['{"药": ["甲", "乙", "丙", "丁"]}', '{"药": ["布洛芬"]}', '{"药": "无"}']
    replies = ['{"药": ["甲", "戊"]}', '{"药": "布洛芬"}', "没有药"]
    items = [item(str(n), one, group="xxy"[n]) for n, one in enumerate(wanted)]
    found = summarised(task("extraction_micro_f1", "extraction_f1"), items, replies)
    assert found["value"] == extraction.score_extraction(replies, wanted).micro.f1
    assert found["value"] == 2 * 2 / (3 + 6)
    assert found["metrics"]["extraction_f1"]["value"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert found["groups"]["x"]["value"] == 2 * 2 / (3 + 5) and found["groups"]["y"]["value"] == 0
    assert found["averages"]["by group"] == pytest.approx(1 / 4)
    assert found["unparsed"]["count"] == 1
    assert scored.micro_f1((0, 0, 0)) == 1.0


def test_constraints_weigh_alike() -> None:
    two = [{"kind": "words", "at_most": 3}, {"kind": "no comma"}]
    items = [item("0", constraints=[*two, {"kind": "lower case"}]), item("1", constraints=two[:1])]
    one = task("instructions", "instructions_loose", "constraints")
    found = summarised(one, items, ["Yes", "one two three four"])
    assert found["value"] == 2 / 4 and found["metrics"]["constraints"]["value"] == 0
    assert found["low"] == 0 and found["high"] == pytest.approx(2 / 3)


def test_what_could_not_be_asked_follows_nothing() -> None:
    asked = item("0", constraints=[{"kind": "no comma"}])
    (row,) = scoring.run(toy(most=1), task("instructions"), [asked])
    assert row["values"] == {"instructions": None} and row["counts"] == {"instructions": (0, 1)}
    assert results.summarise(task("instructions"), [asked], {0: [row]})["value"] == 0


ROW = {
    "prompt": "def one():\n",
    "test": "def check(f):\n    assert f() == 1\n",
    "entry_point": "one",
}


def test_pass_at_k_of_code_over_seeds() -> None:
    """One of four right, and all of four: pass@2 is (1 − C(3,2)/C(4,2) + 1) / 2."""
    items = [item("a", **ROW), item("b", **ROW)]
    right, wrong = "    return 1\n", "    return 2\n"
    drawn = [[right, right], [wrong, right], [wrong, right], ["    syntax error", right]]
    found = summarised(task("code", temperature=0.8), items, *drawn)
    assert found["value"] == pytest.approx((1 / 4 + 1) / 2)
    passed = {k: one["value"] for k, one in found["metrics"].items()}
    assert passed == {
        "code": found["value"],
        "pass@2": pytest.approx((1 / 2 + 1) / 2),
        "pass@4": 1.0,
    }
    assert found["metrics"]["pass@2"]["low"] < 0.75 < found["metrics"]["pass@2"]["high"]
    assert "pass@1" not in summarised(task("code"), items, drawn[0])["metrics"]


def test_code_is_marked_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = scored.running.check_all

    def counted(tasks: Any) -> Any:
        asked.append(len(tasks))
        return real(tasks)

    monkeypatch.setattr(scored.running, "check_all", counted)
    replies = iter(["    return 1\n", "    return 2\n", "    return 1\n"])
    items = [item(name, **ROW) for name in "abc"]
    rows = scoring.run(toy(reply=lambda request: next(replies)), task("code"), items)
    assert asked == [3] and [row["values"]["code"] for row in rows] == [1, 0, 1]
    assert "AssertionError" in rows[1]["why"]["code"]


def test_seeds_need_something_drawn(shared_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path: Path = shared_data("human_eval/HumanEval.jsonl.gz")
    monkeypatch.setenv("HERDBOOK_DATA", str(path.parent.parent))
    with pytest.raises(ConfigError, match="nothing is drawn"):
        Evaluate("x", "humaneval", seeds=(0, 1)).check()
    Evaluate("x", "humaneval-drawn", seeds=(0, 1)).check()
