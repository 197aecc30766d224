"""`herd eval --suite health`: its figures by hand, its files, what a kill leaves, a real model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herdbook import cli
from herdbook.book.book import Artifact, Book
from herdbook.data.teacher import Answer, Ask, ScriptedTeacher
from herdbook.errors import ConfigError, DataError
from herdbook.evaluation import health
from herdbook.evaluation.health import Health
from herdbook.model.fetch import Fetch

from .test_task_items import write


@pytest.fixture
def model(book: Book, tiny_folder: Path) -> Artifact:
    return Fetch(str(tiny_folder)).run(book, name="tiny")


ROWS = (
    {"id": "a", "prompt": "loop!"},
    {"id": "b", "question": "capital of France?", "passages": ["Paris is the capital.", "x"]},
    {"id": "c", "prompt": "法国的首都是哪里？", "passages": ["巴黎是法国的首都。"]},
    {"id": "d", "prompt": "你好"},
)


def reply(ask: Ask) -> Answer:
    said = ask.messages[0].content
    if "loop" in said:
        return Answer("and so on, " * 20, finished=False)
    if "France" in said:
        return Answer("Paris 1999." if ask.temperature == 0 or ask.seed % 2 else "It is Rome.")
    return Answer("巴黎。" if "巴黎" in said else " ")


@pytest.fixture
def by(monkeypatch: pytest.MonkeyPatch) -> Callable[[ScriptedTeacher], None]:
    """The model is this teacher from now on."""
    return lambda one: monkeypatch.setattr(health, "opened", lambda ref, book: one)


By = Callable[[ScriptedTeacher], None]


def test_figures_by_hand(model: Artifact, book: Book, tmp_path: Path, by: By) -> None:
    file, seen = write(tmp_path / "own.jsonl", *ROWS), []
    teacher = ScriptedTeacher(lambda ask: seen.append(ask) or reply(ask))
    step = Health("tiny", str(file), samples=2)
    by(teacher)
    report = step.run(book, name="tiny-health")
    found = health.result_of(report)
    assert (report.kind, report.parents, teacher.calls, len(seen)) == ("report", (model.id,), 1, 12)
    assert [one.temperature for one in seen[:3]] == [0, 0.7, 0.7] and seen[1].seed != seen[2].seed
    every, english, chinese = (found[name] for name in ("all", "en", "zh"))
    assert every["looping"]["value"] == every["unfinished"]["value"] == 1 / 4
    assert english["looping"]["value"] == 1 / 2 and chinese["looping"]["value"] == 0
    assert every["looping"]["low"] < 1 / 4 < every["looping"]["high"]
    assert every["empty"]["value"] == 1 / 4 and chinese["empty"]["value"] == 1 / 2
    assert english["self_consistency"]["value"] == pytest.approx((1 + 0) / 2)
    assert english["faithfulness"]["value"] == 1 / 2 and chinese["faithfulness"]["value"] == 1
    assert every["faithfulness"]["n"] == 2 and every["distinct_1"]["value"] == pytest.approx(7 / 64)
    (loop,) = found["loops"]
    assert loop["id"] == "a" and loop["cycle"] == "and so on, "
    assert found["unsupported"] == [{"id": "b", "prompt": "capital of France?", "words": ["1999"]}]
    assert (
        "Passage 2: x" in seen[3].messages[0].content
        and "材料1: 巴黎" in seen[6].messages[0].content
    )
    assert report.metrics["looping_share"] == 1 / 4 and report.metrics["prompts"] == 4
    told = "\n".join(health.lines(found))
    assert "looping: all 25.0 %" in told and "en 50.0 %" in told and "1999" in told
    rows = [json.loads(one) for one in (report.path / health.REPLIES).read_text().splitlines()]
    assert [len(row["samples"]) for row in rows] == [2] * 4
    file.write_text(file.read_text().replace("loop!", "loops!"))
    assert step.resolved(book).key() != report.key


def test_a_kill_keeps_what_was_answered(
    model: Artifact, book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: By
) -> None:
    monkeypatch.setattr(health, "BATCH", 3)
    step = Health("tiny", str(write(tmp_path / "own.jsonl", *ROWS)), samples=2)

    def killed(ask: Ask) -> Answer:
        if "你好" in ask.messages[0].content:
            raise KeyboardInterrupt
        return reply(ask)

    by(ScriptedTeacher(killed))
    with pytest.raises(KeyboardInterrupt):
        step.run(book)
    by(again := ScriptedTeacher(reply))
    found = health.result_of(step.run(book))
    assert again.calls == 1 and found["all"]["looping"]["value"] == 1 / 4


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, "lacks a prompt"),
        ({"prompt": " "}, "lacks a prompt"),
        ({"prompt": "x", "passages": "y"}, "are no list of texts"),
        ({"prompt": "x", "id": "a"}, "earlier row's already"),
        ("x", "rows of prompt"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says) as raised:
        health.read(write(tmp_path / "own.jsonl", ROWS[0], row))
    assert "line 2" in str(raised.value)


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are two runs"):
        cli.eval_command("tiny", task=["mmlu"], suite="health")
    with pytest.raises(ConfigError, match="--prompts without --suite"):
        cli.eval_command("tiny", prompts="own.jsonl")
    with pytest.raises(ConfigError, match="--judge without --task"):
        cli.eval_command("tiny", judge="tiny", suite="health")
    with pytest.raises(ConfigError, match="samples 1 must be 2 or more"):
        Health("tiny", samples=1).check()
    with pytest.raises(DataError, match="is not there"):
        Health("tiny", str(tmp_path / "none.jsonl")).check()


def test_shipped_prompts() -> None:
    asked = Health("x").asked()
    assert len(asked) == 40 == len({one.id for one in asked})
    assert [one.language for one in asked] == ["en"] * 20 + ["zh"] * 20
    assert sum(bool(one.passages) for one in asked) == 12
    assert [one.id for one in Health("x", limit=4).asked()] == ["en-1", "en-11", "zh-1", "zh-11"]


def test_the_command_with_a_real_model(
    smollm2_path: Path,
    book: Book,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Fetch(str(smollm2_path)).run(book, name="small")

    def herd(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["herd", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    out = herd("eval", "small", "--suite", "health", "--limit", "2", "--samples", "2")
    assert "health: 2 prompts, 2 samples" in out and "in the book: small-health@1" in out
    found = json.loads(
        herd("eval", "small", "--suite", "health", "--limit", "2", "--samples", "2", "--json")
    )["small-health@1"]
    assert found["all"]["empty"]["value"] == 0 < found["all"]["self_consistency"]["value"] <= 1
    assert len(found["loops"]) == round(2 * found["all"]["looping"]["value"])
