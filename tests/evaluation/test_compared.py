"""Two models side by side: tasks paired question by question, gates, the answer in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from herdbook import cli
from herdbook.book.book import Artifact, Book
from herdbook.errors import ConfigError, FileError, UnknownName
from herdbook.evaluation import report as module
from herdbook.evaluation.answer import answer, lines
from herdbook.evaluation.report import Report
from herdbook.evaluation.report_page import report_page

#: a paired result as paired.compare and the tasks' reports give it
GAIN = {
    "metric": "acc", "items": 200, "detectable": 0.04, "mcnemar": {"won": 30, "lost": 10, "p": 0.002},
    "before": {"value": 0.30, "low": 0.24, "high": 0.37},
    "after": {"value": 0.40, "low": 0.33, "high": 0.47},
    "difference": {"value": 0.1, "low": 0.04, "high": 0.16},
}  # fmt: skip
ZERO = GAIN | {"difference": {"value": 0.0, "low": -0.03, "high": 0.03}}


@pytest.fixture
def pair(book: Book, tiny_folder: Path, tmp_path: Path) -> tuple[Artifact, Artifact]:
    """The tiny model, and one whose head says the opposite."""
    import torch
    from safetensors.torch import load_file, save_file

    sides = []
    for name in ("base", "turned"):
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        if name == "turned":
            tensors = load_file(folder / "model.safetensors")
            tensors["model.norm.weight"] = -tensors["model.norm.weight"]
            assert torch.isfinite(tensors["model.norm.weight"]).all()
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        sides.append(
            book.add(
                folder, kind="model", name=name, parents=[], step="Fetch", key=name, config={},
                metrics={}, versions={},
            )
        )  # fmt: skip
    return sides[0], sides[1]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Questions whose answers are what the tiny model likes best, so that its opposite is wrong."""
    path = tmp_path / "own.jsonl"
    rows = [
        {"question": f"who are you {n}?", "choices": ["a", "m"], "answer": "a"} for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed and size are not what is tried here."""
    figures = dict.fromkeys(
        ("size_bytes", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes", "load_s"), 1.0
    )
    monkeypatch.setattr(module, "measure", lambda path: figures)


def test_tasks_are_paired_and_a_gate_stops_with_everything_kept(
    pair: tuple[Artifact, Artifact], task: Path, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    given: dict[str, Any] = {"tasks": (str(task),), "max_perplexity_increase": 0.0}
    report = Report(pair[0].id, pair[1].id, max_drop={"own": 0.1}, **given).run(book)
    found = json.loads((report.path / "report.json").read_text())
    one = found["tasks"]["own"]
    marks = [book.get(ref) for ref in one["reports"]]
    values = [json.loads((m.path / "evaluation.json").read_text())["value"] for m in marks]
    assert sorted(values) == [0.0, 1.0] and one["items"] == 12  # each is the other's opposite
    assert one["difference"]["value"] == values[1] - values[0]
    won, lost = one["mcnemar"]["won"], one["mcnemar"]["lost"]
    assert {won, lost} == {0, 12} and one["mcnemar"]["p"] == pytest.approx(2 / 2**12)
    (gate,) = [gate for gate in found["gates"] if gate["name"] == "own drops"]
    assert gate["passed"] is (values[1] > values[0]) and gate["value"] == values[0] - values[1]
    assert report.metrics["own_gain_share"] == values[1] - values[0]
    # the other way round one gate holds and the other breaks; nothing is asked a second time
    back = Report(pair[1].id, pair[0].id, max_drop={"own": 0.1}, **given).run(book)
    verdicts = {report.metrics["verdict"], back.metrics["verdict"]}
    assert verdicts == {"passed", "failed: own drops 100.0 %, at most 10 %"}
    assert len([one for one in book.entries("report") if one.step == "Evaluate"]) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tasks": ("mmlu2",)}, "task 'mmlu2' is not known"),
        ({"tasks": ("wikitext2",)}, "task wikitext2 is a text"),
        ({"max_drop": {"mmlu": 0.1}}, "max_drop: mmlu: 0.1 must name one of the report's tasks"),
        ({"max_drop": 0.1}, "max_drop is 0.1 but must be a mapping"),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(given: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=said):
        Report("a", "b", **given).check()


def test_a_drop_must_be_a_share(task: Path) -> None:
    step = Report("a", "b", tasks=(str(task),), max_drop={"own": 3})
    with pytest.raises(ConfigError, match="a share from 0 to below 1"):
        step.check()


def test_the_answer(made_up: dict[str, Any]) -> None:
    report = made_up | {"tasks": {"mmlu": GAIN, "cmmlu": ZERO}, "asked": {"en": GAIN}}
    found = answer(report)
    assert [one["what"] for one in found["better"]] == ["who it is, in English", "mmlu"]
    assert [one["what"] for one in found["worse"]] == ["perplexity (zh)"]
    assert [one["what"] for one in found["undecided"]] == ["cmmlu", "perplexity (en)"]
    (worse,) = found["worse"]
    assert worse["low"] < worse["value"] < worse["high"] < 0
    assert worse["value"] == pytest.approx(-0.041)
    told = "\n".join(lines(report))
    assert told.startswith("cria@1 against smollm2@1\n")
    assert "better:     mmlu +10.0 points (+4.0 … +16.0)\n" in told
    assert "cmmlu +0.0 points (−3.0 … +3.0; 4.0 would have been seen four times of five)" in told
    assert "mmlu: acc 30.0 → 40.0 %, 200 questions; won 30, lost 10" in told
    assert "on disk: 98.4 MB → 84.1 MB" in told
    page = report_page(report)
    assert (
        "won 30, lost 10" in page
        and "from 4.0 points on it would be seen" in page
        and "shown to be better" in page
        and "确有下降" in page
    )


def test_asked_questions_are_paired(made_up: dict[str, Any]) -> None:
    found = module.asked(made_up["before"], made_up["after"])
    assert set(found) == {"en", "zh"}  # the ordinary one was asked of one side alone
    assert found["en"]["items"] == 9 and found["en"]["difference"]["value"] == 1


def test_the_command(
    pair: tuple[Artifact, Artifact], task: Path, tmp_path: Path, book: Book,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    quick(monkeypatch)
    monkeypatch.setenv("HERDBOOK_HOME", str(book.home))
    page = tmp_path / "page.html"
    for _ in range(2):  # the second time it is in the book, and the page is one of ours
        cli.compare("base", "turned", task=[str(task)], out=page)
    told = capsys.readouterr().out
    assert told.count("turned@1 against base@1\n") == 2 and told.count("turned-compare@1") == 2
    assert "own: acc" in told and "12 questions" in told
    assert page.read_text().startswith("<!doctype html>")
    cli.compare("base", "turned", task=[str(task)], json=True)
    assert json.loads(capsys.readouterr().out)["answer"]["undecided"] is not None
    (tmp_path / "mine.html").write_text("my own page")
    with pytest.raises(FileError, match="is there already"):
        cli.compare("base", "turned", out=tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "my own page"
    with pytest.raises(ConfigError, match="'turned' and 'turned@1' are one and the same model"):
        cli.compare("turned", "turned@1")
