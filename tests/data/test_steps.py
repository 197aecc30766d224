"""The three steps that make datasets: in a real book, reproducible, resumable."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from herdbook.book.book import Artifact, Book
from herdbook.data import records, retention
from herdbook.data.identity import Identity
from herdbook.data.retention import CHUNK, Retain, prompts
from herdbook.data.teacher import Answer, Ask, ScriptedTeacher
from herdbook.data.user import Import
from herdbook.errors import ConfigError, DataError


def write_alpaca(path: Path, count: int) -> Path:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}."} for n in range(count)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def questions(path: Path) -> list[str]:
    return [row.messages[0].content for row in records.read(path)]


# ------------------------------------------------------------------------------------------ Import


def test_import_splits_and_counts(book: Book, tmp_path: Path) -> None:
    data = write_alpaca(tmp_path / "rows.json", 100)
    made = Import(data=str(data), heldout=0.1).run(book)
    train, held = questions(made.path / "train.jsonl"), questions(made.path / "heldout.jsonl")
    assert (len(train), len(held)) == (90, 10)
    assert sorted(train + held) == sorted(f"Say {n}." for n in range(100))
    assert made.metrics["conversations"] == 90 and made.metrics["heldout"] == 10
    assert made.kind == "dataset"
    other = Import(data=str(data), heldout=0.1, seed=1).run(book, name="other")
    assert questions(other.path / "heldout.jsonl") != held
    few = Import(data=str(data), limit=7, heldout=0).run(book, name="few")
    assert len(questions(few.path / "train.jsonl")) == 7
    assert not (few.path / "heldout.jsonl").exists()
    one = Import(data=str(data), limit=1).run(book, name="one")
    assert len(questions(one.path / "train.jsonl")) == 1


def test_a_conversation_that_comes_again_is_taken_once(book: Book, tmp_path: Path) -> None:
    """Where it first stood, with the line of the last."""
    rows = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in (1, 2, 1, 3, 2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made = Import(data=str(path), heldout=0).run(book)
    assert questions(made.path / "train.jsonl") == ["Say 1.", "Say 2.", "Say 3."]
    assert [row.extra["line"] for row in records.read(made.path / "train.jsonl")] == [3, 5, 4]
    assert made.metrics["repeated"] == 2 and made.metrics["conversations"] == 3


@pytest.mark.parametrize("layout", ["lines", "array", "gzip"])
def test_import_holds_a_row_and_not_the_file(book: Book, tmp_path: Path, layout: str) -> None:
    """40 MB of rows: what is held of them at most is a few pieces and the rows' hashes."""
    row = {"instruction": "Say {}.", "output": "word " * 2000}
    text = [json.dumps(row).replace("{}", str(n)) for n in range(4000)]
    path = tmp_path / "rows.json"
    whole = "[" + ", ".join(text) + "]" if layout == "array" else "\n".join(text)
    if layout == "gzip":
        path.write_bytes(gzip.compress(whole.encode(), 1))
    else:
        path.write_text(whole)
    size = len(whole)
    del text, whole
    tracemalloc.start()
    try:
        made = Import(data=str(path), heldout=0.01).run(book)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert made.metrics["conversations"] == 3960
    assert most < size / 4


def test_import_notices_a_changed_file(book: Book, tmp_path: Path) -> None:
    step = Import(data=str(write_alpaca(tmp_path / "rows.json", 20)))
    first = step.run(book)
    assert step.run(book).id == first.id
    write_alpaca(tmp_path / "rows.json", 21)
    assert step.run(book).id != first.id


def test_import_reports_what_it_left_out(book: Book, tmp_path: Path) -> None:
    rows = [{"instruction": "A?", "output": "A"}] * 3 + [{"instruction": "B?", "output": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    metrics = Import(data=str(path), heldout=0).run(book).metrics
    assert metrics["rows"] == 4 and metrics["skipped"] == 1
    assert metrics["skipped_empty_answer"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ""}, "data is empty"),
        ({"heldout": 1.0}, "no share"),
        ({"limit": -1}, "negative"),
    ],
)
def test_import_refuses_settings(
    book: Book, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = write_alpaca(tmp_path / "rows.json", 3)
    with pytest.raises(ConfigError, match=message):
        Import(**{"data": str(path), **settings}).run(book)
    assert not book.entries()


def test_a_refused_file_leaves_the_book_empty(book: Book, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"instruction": "x", "output": "y"}\n{"text": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        Import(data=str(path)).run(book)
    assert not book.entries()


# ---------------------------------------------------------------------------------------- Identity


def test_identity_is_the_same_twice_and_differs_by_seed(book: Book, tmp_path: Path) -> None:
    made = Identity(name="Luna", keeper="Acme").run(book)
    again = Identity(name="Luna", keeper="Acme").run(Book(tmp_path / "other"))
    assert made.id == again.id
    assert Identity(name="Luna", keeper="Acme", seed=1).run(book).id != made.id
    assert made.metrics["conversations"] == len(records.read(made.path / "train.jsonl"))


# ------------------------------------------------------------------------------------------ Retain


@pytest.fixture
def base(book: Book, tmp_path: Path) -> Artifact:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    return book.add(
        folder, kind="model", name="base", parents=[], step="Fetch", key="k", config={}, metrics={},
        versions={},
    )  # fmt: skip


def reply(ask: Ask) -> Answer:
    question = ask.messages[-1].content
    if "tea" in question:
        return Answer("First you take", finished=False)
    if "moon" in question.casefold():
        return Answer("I am SmolLM.")
    return Answer(f" Answer to: {question}\n")


def test_retention_keeps_every_answer_that_does_not_name_the_base(
    book: Book, base: Artifact
) -> None:
    texts = [text for _, text in prompts()]
    made = Retain(teacher="base", rows=len(texts)).run(
        book, teacher=lambda artifact: ScriptedTeacher(reply)
    )
    rows = records.read(made.path / "train.jsonl")
    for row in rows:
        question = row.messages[0].content
        answer = "First you take" if "tea" in question else f"Answer to: {question}"
        assert row.messages[1].content == answer
        assert row.extra["learn"] == "keep"
    named = sum("moon" in text.casefold() and "tea" not in text for text in texts)
    assert named > 0 and made.metrics["named_the_base"] == named
    assert len(rows) == made.metrics["conversations"] == len(texts) - named
    assert made.parents == (base.id,)


class Killed(BaseException):
    """Stands for kill -9: no handler of ours runs on it."""


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_killed_retention_goes_on_to_the_same_bytes(
    book: Book, base: Artifact, tmp_path: Path, calls: int
) -> None:
    step = Retain(teacher="base", rows=180)
    whole = ScriptedTeacher(reply)
    made = step.run(book, name="whole", teacher=lambda artifact: whole)

    import shutil

    second = Book(tmp_path / "second")
    copy = tmp_path / "copy"
    shutil.copytree(base.path, copy)
    second.add(
        copy, kind="model", name="base", parents=[], step="Fetch", key="k", config={}, metrics={},
        versions={},
    )  # fmt: skip
    teacher = ScriptedTeacher(reply)

    def dies(ask: Ask) -> Answer:
        if teacher.calls > calls:
            raise Killed
        return reply(ask)

    teacher.script = dies
    with pytest.raises(Killed):
        step.run(second, name="whole", teacher=lambda artifact: teacher)
    assert [one.kind for one in second.entries()] == ["model"]
    fresh = ScriptedTeacher(reply)
    resumed = step.run(second, name="whole", teacher=lambda artifact: fresh)
    assert resumed.id == made.id
    assert fresh.calls == whole.calls - calls == -(-180 // CHUNK) - calls


def test_retention_refuses(book: Book, base: Artifact) -> None:
    with pytest.raises(ConfigError, match=f"not from 1 to {len(prompts())}"):
        Retain(teacher="base", rows=1000).run(book, teacher=lambda a: ScriptedTeacher(reply))
    with pytest.raises(DataError, match="none of 5 answers"):
        Retain(teacher="base", rows=5).run(
            book, teacher=lambda a: ScriptedTeacher(lambda ask: Answer("", True))
        )


def test_few_rows_are_spread_over_both_languages(book: Book, base: Artifact) -> None:
    made = Retain(teacher="base", rows=40).run(book, teacher=lambda a: ScriptedTeacher(reply))
    rows = records.read(made.path / "train.jsonl")
    languages = [row.extra["language"] for row in rows]
    assert min(languages.count("en"), languages.count("zh")) >= 18


def test_the_prompts_are_many_distinct_and_not_about_the_assistant() -> None:
    texts = prompts()
    assert len(set(texts)) == len(texts) > 250
    assert sum(language == "zh" for language, _ in texts) >= 100
    for _, text in texts:
        assert not any(w in text.casefold() for w in ("your name", "who are you", "你是", "你叫"))
    assert retention.CHUNK == 64  # another size makes other files in half-done work folders


def test_a_conversation_is_never_on_both_sides(book: Book, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n % 20}.", "output": f"{n % 20}"} for n in range(100)]
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Import(data=str(file), heldout=0.3).run(book)
    train, held = (questions(made.path / f"{name}.jsonl") for name in ("train", "heldout"))
    assert not set(train) & set(held) and len(train) + len(held) == 20
    assert made.metrics["repeated"] == 80
