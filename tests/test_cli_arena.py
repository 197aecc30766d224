"""`herd arena` and `herd judge` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from herdbook import cli_arena
from herdbook.book.book import Book
from herdbook.data.teacher import Answer, Ask, ScriptedTeacher
from herdbook.errors import ConfigError, DataError, FileError
from herdbook.evaluation.judging import session
from herdbook.evaluation.judging import teachers as teachers_module

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
def teachers(book: Book, monkeypatch: pytest.MonkeyPatch) -> dict[str, ScriptedTeacher]:
    """Models by name: `judge` likes long answers, the others say what they are called."""

    def verdict(ask: Ask) -> Answer:
        parts = ask.messages[-1].content.split("<<answer")[1:]
        if len(parts) == 1:
            return Answer("Hm." if "?" in parts[0] else "Fine. [[8]]")
        first, second = (len(part.split("<</")[0]) for part in parts[-2:])
        return Answer("[[A]]" if first > second else "[[B]]")

    found = {"judge": ScriptedTeacher(verdict)}
    found |= {n: ScriptedTeacher(lambda ask, n=n: Answer(n)) for n in ("cria", "small")}  # type: ignore[misc]
    monkeypatch.setattr(teachers_module, "opened", lambda ref, name="", *, book: found[ref])
    monkeypatch.setattr(teachers_module, "identity", lambda ref, name, book: [ref, name])
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


def test_a_url_needs_a_name(tmp_path: Path, book: Book) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "x"}])
    with pytest.raises(ConfigError, match="--by-model NAME"):
        cli_arena.judge(file, by="http://127.0.0.1:1/v1")


MT = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 101, "category": "math", "turns": ["1 + 1?", "2 + 2?"]},
]
REFERENCE = {"question_id": 101, "choices": [{"index": 0, "turns": ["It is 2.", "It is 4."]}]}


def test_mt_bench_s_files(tmp_path: Path, capsys: Captured, teachers: Any) -> None:
    seen: list[Ask] = []

    teachers["judge"] = ScriptedTeacher(lambda ask: seen.append(ask) or Answer(f"[[{len(seen)}]]"))
    file, out = write(tmp_path / "question.jsonl", MT), tmp_path / "judged.jsonl"
    reference = write(tmp_path / "gpt-4.jsonl", [REFERENCE])
    how: dict[str, Any] = {"by": "judge", "model": "cria", "reference": reference, "out": out}
    cli_arena.judge(file, **how, max_tokens=7)
    told = capsys.readouterr().out
    assert "turn 1         2.00" in told and "turn 2         3.00" in told and "judged 4" in told
    shown = [ask.messages[1].content for ask in seen]
    assert ["It is 2." in one for one in shown] == [False, False, True, True]
    assert ["It is 4." in one for one in shown] == [False, False, False, True]
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["category"] for row in rows] == ["writing"] * 2 + ["math"] * 2
    cli_arena.judge(file, **how)  # its own judgements may be written over
    theirs = write(tmp_path / "theirs.jsonl", [{"question": "mine"}])
    with pytest.raises(FileError, match="holds no judgements"):
        cli_arena.judge(file, **how | {"out": theirs})
    with pytest.raises(FileError, match="holds no judgements"):
        cli_arena.judge(file, **how | {"out": tmp_path})
    assert json.loads(theirs.read_text()) == {"question": "mine"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question_id": 7, "reference": ["x"]}, "no reference for any question"),
        ({"question_id": 101, "reference": ["x"]}, "has 1 references, but 2 turns"),
        ({"reference": ["x"]}, "where rows of question_id"),
        ({"question_id": 101, "choices": []}, "where rows of question_id"),
    ],
)
def test_references_that_cannot_be(tmp_path: Path, teachers: Any, row: Any, says: str) -> None:
    file = write(tmp_path / "question.jsonl", MT)
    with pytest.raises(DataError, match=says):
        cli_arena.judge(
            file, by="judge", model="cria", reference=write(tmp_path / "r.jsonl", [row])
        )
    assert not teachers["cria"].calls


@pytest.mark.parametrize("against", ["", "small"])
def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, book: Book, capsys: Captured, teachers: Any, monkeypatch: pytest.MonkeyPatch,
    against: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(session, "BATCH", 1)
    file, whole = write(tmp_path / "q.jsonl", MT), teachers["judge"]
    calls: list[int] = []

    def killed(ask: Ask) -> Answer:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Answer("[[A]] [[6]]")

    how: dict[str, Any] = {"by": "judge", "model": "cria", "against": against, "json": True}
    teachers["judge"] = ScriptedTeacher(killed)
    with pytest.raises(KeyboardInterrupt):
        cli_arena.judge(file, **how)
    answered = teachers["cria"].calls
    teachers["judge"] = again = ScriptedTeacher(lambda ask: Answer("[[A]] [[6]]"))
    cli_arena.judge(file, **how)
    found = json.loads(capsys.readouterr().out)
    assert found["judged"] == 4 and teachers["cria"].calls == answered == 4 and whole.calls == 0
    assert again.calls == (3 if against else 1), "what was judged is not judged again"
    assert found["mean"]["value"] == (0.5 if against else 6)
    assert not [*book.home.glob("work/*/")], "nothing is left behind"


def test_arena_s_page_overwrites_no_other_file(tmp_path: Path) -> None:
    log = write(tmp_path / "v.jsonl", [vote("x", "y", "model_a")] * 3)
    with pytest.raises(FileError, match="no page of Herdbook's"):
        cli_arena.arena(log, out=log, draws=100)
    assert len(log.read_text().splitlines()) == 3
