"""The step and the command: found again, gone on with after a kill, told in a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from herdbook import cli
from herdbook.book.book import Artifact, Book
from herdbook.book.tree import reports
from herdbook.errors import ConfigError, DataError, TemplateError, UnknownName
from herdbook.evaluation import run
from herdbook.evaluation.page import page
from herdbook.evaluation.tasks import scoring
from herdbook.evaluation.tasks import step as evaluating
from herdbook.evaluation.tasks.step import Evaluate
from herdbook.model.fetch import Fetch

from .test_task_items import own, write


@pytest.fixture
def model(book: Book, tiny_folder: Path) -> Artifact:
    return Fetch(str(tiny_folder)).run(book, name="tiny")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(
        tmp_path / "own.jsonl",
        *(
            {"question": f"who are you {n}?", "choices": ["I", "a model"], "answer": n % 2}
            for n in range(11)
        ),
    )


def read(report: Artifact) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (report.path / evaluating.ITEMS).read_text().splitlines()
    return evaluating.read(report), [json.loads(line) for line in lines]


def test_a_report_in_the_book(model: Artifact, book: Book, rows: Path) -> None:
    report = Evaluate("tiny", str(rows)).run(book, name="tiny-own")
    result, answered = read(report)
    assert report.parents == (model.id,) and report.kind == "report"
    assert result["model"] == {"ref": "tiny@1", "id": model.id}
    assert [row["id"] for row in answered] == [str(n) for n in range(1, 12)]
    assert result["value"] == sum(row["values"]["acc"] for row in answered) / 11
    assert result["n"] == result["of"] == 11 and result["chance"] == 0.5 and result["version"] == 1
    assert report.metrics["acc_share"] == result["value"]
    assert report.metrics["acc_low_share"] == result["low"] < result["value"] < result["high"]
    assert "tiny-own" in page(report, book) and "tiny" in page(model, book)
    assert [one.id for one in reports(book, model)] == [report.id]
    assert Evaluate("tiny", str(rows)).run(book, name="tiny-own").id == report.id
    changed = rows.read_text().replace("model", "friend")
    rows.write_text(changed)
    assert Evaluate("tiny", str(rows)).run(book, name="tiny-own").id != report.id


def test_an_adapter_is_asked_on_its_base(
    model: Artifact, book: Book, rows: Path, tmp_path: Path
) -> None:
    from herdbook.model.checkpoint import load_decoder
    from herdbook.model.lora import adapters_of, put_adapter
    from herdbook.training import peft_format

    desk = tmp_path / "adapter"
    desk.mkdir()
    decoder = load_decoder(model.path, torch.float32)
    put_adapter(decoder, "blocks.0.attention.q", 2, 4.0)
    for adapter in adapters_of(decoder).values():
        for one in adapter.parameters(recurse=False):
            torch.nn.init.constant_(one, 0.3)
    peft_format.save(decoder, desk, base=model.id)
    book.add(
        desk, kind="adapter", name="tuned", parents=[model.id], step="Made", key="sha256:tuned",
        config={}, metrics={}, versions={},
    )  # fmt: skip
    (_, tuned), (_, plain) = (run.run(one, [str(rows)], book)[0] for one in ("tuned", "tiny"))
    assert tuned["model"]["ref"] == "tuned@1" and tuned["prompt_hash"] == plain["prompt_hash"]
    ours, base = (read(book.get(f"{one}-own"))[1] for one in ("tuned", "tiny"))
    assert [row["logprobs"] for row in ours] != [row["logprobs"] for row in base]


def test_a_kill_changes_nothing(
    model: Artifact,
    book: Book,
    rows: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "SCORED", 3)
    asked: list[list[str]] = []
    real = scoring.run

    def killed(*arguments: Any, **how: Any) -> Any:
        asked.append([item.id for item in arguments[2]])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **how)

    monkeypatch.setattr(scoring, "run", killed)
    step = Evaluate("tiny", str(rows))
    with pytest.raises(KeyboardInterrupt):
        step.run(book)
    assert not book.entries("report")
    (kept,) = book.home.glob("work/*/0.jsonl")
    assert len(kept.read_text().splitlines()) == 6
    with kept.open("a") as file:
        file.write('{"id": "cut in the mid')  # the third batch was being written
    again = step.run(book)
    assert asked[2] == asked[3] and len(asked) == 5, "what was there is not asked again"
    monkeypatch.setattr(scoring, "run", real)
    fresh = Book(tmp_path / "fresh")
    Fetch(str(tiny_folder)).run(fresh, name="tiny")
    assert step.run(fresh).files == again.files, "to the last bit"


def test_seeds_of_drawn_replies(model: Artifact, book: Book, tmp_path: Path) -> None:
    path = own(tmp_path, temperature=1.2, max_tokens=4)
    report = Evaluate("tiny", str(path), seeds=(3, 4), limit=5).run(book)
    result, answered = read(report)
    assert [row["seed"] for row in answered] == [3] * 5 + [4] * 5
    assert set(result["seeds"]) == {"3", "4"} and "spread" in result and result["n"] == 5
    replies = [[row["reply"] for row in answered if row["seed"] == seed] for seed in (3, 4)]
    assert replies[0] != replies[1]


def test_a_group_is_the_mean_of_its_tasks(
    model: Artifact, book: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "safetybench"
    folder.mkdir(parents=True)
    safe = [
        {"id": n, "category": "xy"[n % 2], "question": "?", "options": ["a", "b"], "answer": 0}
        for n in range(4)
    ]
    write(folder / "zh_subset.jsonl.gz", *safe)
    monkeypatch.setenv("HERDBOOK_DATA", str(tmp_path / "data"))
    safety = str(tmp_path / "safety.yaml")
    Path(safety).write_text("tasks: [safetybench]\n")
    report = Evaluate("tiny", safety).run(book, name="tiny-safety")
    result = evaluating.read(report)
    one = evaluating.read(book.get("tiny-safetybench"))
    assert result["tasks"]["safetybench"]["report"] == book.get("tiny-safetybench").id
    assert result["value"] == one["value"] and result["average"].startswith("mean over tasks")
    assert report.metrics["mean_share"] == one["value"]
    assert "averages" in one and set(one["groups"]) == {"x", "y"}
    with pytest.raises(ConfigError, match="takes no shots"):
        Evaluate("tiny", safety, shots=1).run(book)
    with pytest.raises(DataError, match="mmlu"):
        Evaluate("tiny", "flageval").run(book)
    (tmp_path / "mixed.yaml").write_text("tasks: [safetybench, wikitext2]\n")
    with pytest.raises(ConfigError, match="neither groups nor texts"):
        Evaluate("tiny", str(tmp_path / "mixed.yaml")).run(book)


def test_a_chat_needs_a_template(model: Artifact, book: Book, rows: Path) -> None:
    chat = evaluating.read(Evaluate("tiny", str(rows), chat=True).run(book, name="chat"))
    plain = evaluating.read(Evaluate("tiny", str(rows)).run(book, name="plain"))
    assert chat["chat"].startswith(("sha256:", "chatml")) and plain["chat"] == ""
    bare = load_without_template(model)
    with pytest.raises(TemplateError, match="has no chat template"):
        evaluating._template(bare)


def load_without_template(model: Artifact) -> Any:
    from herdbook.engine.loading import load

    found = load(str(model.path))
    found.tokenizer.chat_template = None
    return found


def test_the_command(
    model: Artifact,
    book: Book,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("who are you? I am a small model.\n" * 9)

    def herd(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["herd", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        done = capsys.readouterr()
        assert not ended.value.code, done.err
        return done.out

    out = herd("eval", "tiny", "--task", str(rows), "--task", str(text), "--limit", "4")
    assert "own: acc " in out and "chance 50.0 %" in out and "4 of 11 questions" in out
    assert "notes: bits per byte " in out and "in the book: tiny-notes@1" in out
    found = json.loads(herd("eval", "tiny", "--task", str(rows), "--limit", "4", "--json"))
    assert found["tiny-own@1"]["n"] == 4
    assert (
        "mmlu" in herd("tasks") and json.loads(herd("tasks", "--json"))["gsm8k"]["licence"] == "MIT"
    )
    assert "prompt:" in herd("tasks", "mmlu")
    with pytest.raises(UnknownName, match="kind report"):
        run.run("tiny-own", [str(rows)], book)
    with pytest.raises(UnknownName, match="did you mean 'tiny'"):
        run.run("tinny", [str(rows)], book)
