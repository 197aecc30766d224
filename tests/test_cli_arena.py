"""`herd arena` and `herd judge` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from herdbook import cli_arena
from herdbook.data.teacher import Answer, Ask, ScriptedTeacher
from herdbook.errors import ConfigError, DataError

Captured = pytest.CaptureFixture[str]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def vote(a: str, b: str, winner: str, **more: Any) -> dict[str, Any]:
    return {"model_a": a, "model_b": b, "winner": winner, "anonymous": True, **more}


def test_arena(tmp_path: Path, capsys: Captured) -> None:
    rows = [vote("cria", "base", "model_a", length_a=50, length_b=60)] * 20
    rows += [vote("base", "cria", "model_a", length_a=80, length_b=60)] * 9
    rows += [vote("base", "cria", "tie") | {"length_a": 50, "length_b": 50}] * 2
    log = write(tmp_path / "votes.jsonl", [*rows, vote("a", "b", "tie") | {"anonymous": False}])
    cli_arena.arena(log, out=tmp_path / "page.html", draws=100)
    told = capsys.readouterr().out
    assert told.index("cria") < told.index("base")
    assert "31 votes, 2 ties, 1 not anonymous and left out" in told and "twice the length" in told
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.startswith("<!doctype html>") and "votes.jsonl" in page
    cli_arena.arena(log, draws=100, json=True)
    board = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in board["models"]] == ["cria", "base"] and board[
        "named_votes"
    ] == 1
    with pytest.raises(ConfigError, match="gives no 95 % interval"):
        cli_arena.arena(log, draws=10)


def test_arena_says_what_has_no_bound(tmp_path: Path, capsys: Captured) -> None:
    cli_arena.arena(write(tmp_path / "v.jsonl", [vote("[bold]x", "y", "model_a")] * 3), draws=100)
    told = capsys.readouterr().out
    assert "bounded by a tie of weight 0.5" in told and "[bold]x" in told


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> dict[str, ScriptedTeacher]:
    """Models by name: `judge` likes long answers, the others say what they are called."""

    def verdict(ask: Ask) -> Answer:
        parts = ask.messages[-1].content.split("<<answer")[1:]
        if len(parts) == 1:
            return Answer("Hm." if "?" in parts[0] else "Fine. [[8]]")
        first, second = (len(part.split("<</")[0]) for part in parts[-2:])
        return Answer("[[A]]" if first > second else "[[B]]")

    found = {"judge": ScriptedTeacher(verdict)}
    found |= {n: ScriptedTeacher(lambda ask, n=n: Answer(n)) for n in ("cria", "small")}  # type: ignore[misc]
    monkeypatch.setattr(cli_arena, "_teacher", lambda ref, name: found[ref])
    return found


def test_judge_scores(tmp_path: Path, capsys: Captured, teachers: Any) -> None:
    rows = [
        {"question": "一加一？", "answer": "二", "reference": "二", "category": "math"},
        {"question": "Why?", "answer": "Because?", "category": "other"},
    ]
    out = tmp_path / "judged.jsonl"
    cli_arena.judge(write(tmp_path / "a.jsonl", rows), by="judge", out=out)
    told = capsys.readouterr().out
    assert "mean of the scores: 8.00" in told and "judged 1, without a verdict 1" in told
    assert "math" in told and "'Hm.'" in told
    judged = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [one["value"] for one in judged] == [8, None] and judged[0]["turns"] == ["一加一？"]


def test_judge_compares_models_that_answer(tmp_path: Path, capsys: Captured, teachers: Any) -> None:
    file = write(tmp_path / "q.jsonl", [{"turns": ["Who?", "And?"]}, {"question": "Why"}])
    cli_arena.judge(file, by="judge", model="cria", against="small", json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["mean"]["value"] == 0 and found["judged"] == 3 and found["consistent"] == 1
    assert teachers["cria"].calls == 2
    other = write(tmp_path / "o.jsonl", [{"question": "Where?", "answer": "x"}])
    with pytest.raises(DataError, match="does not answer the questions"):
        cli_arena.judge(file, by="judge", model="cria", against=str(other))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "Why?"}, "has no answer to judge"),
        ({"answer": "x"}, "neither turns nor a question"),
        ({"question": "Why?", "answer": 3}, "has answers that are no texts"),
        ({"turns": ["a", "b"], "answers": ["x"]}, "has 2 turns, but 1 of answers"),
        ([1], "is no JSON object"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, teachers: Any, row: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        cli_arena.judge(write(tmp_path / "a.jsonl", [row]), by="judge")
    with pytest.raises(DataError, match="cannot be read"):
        cli_arena.judge(tmp_path / "none.jsonl", by="judge")


def test_a_url_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="next: --by-model NAME"):
        cli_arena._teacher("http://127.0.0.1:1/v1", "")
