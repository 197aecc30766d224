"""The report step on a real (tiny) model: measured, judged, entered, and shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from herdbook.book.book import Artifact, Book
from herdbook.data import records
from herdbook.data.records import Conversation
from herdbook.evaluation import report as module
from herdbook.evaluation.evaluate import evaluate
from herdbook.evaluation.page import page
from herdbook.evaluation.report import Report, compare, verdict


def enter(
    book: Book, folder: Path, kind: str, name: str, parents: tuple[Artifact, ...] = ()
) -> Artifact:
    return book.add(
        folder, kind=kind, name=name, parents=[one.id for one in parents], step="Fetch", key=name,
        config={"name": name}, metrics={}, versions={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path
) -> tuple[Book, Artifact, dict[str, int]]:
    """A report of the tiny model against itself; and how often a side was measured."""
    folder = tmp_path_factory.mktemp("report")
    book = Book(folder / "home")
    data = folder / "data"
    data.mkdir()
    asked = {"language": "en", "ask": "name", "expect": {"name": "Luna"}}
    records.write(data / "train.jsonl", [Conversation.of("hello", "I am")])
    records.write(
        data / "heldout.jsonl",
        [
            Conversation.of("who are you", **asked),
            Conversation.of("hello", language="en", ask="none", expect={}, avoid={"name": "Luna"}),
            Conversation.of("who are you", "I am a small model"),
        ],
    )
    data_set = enter(book, data, "dataset", "identity")
    for name in ("base", "raised"):
        shutil.copytree(tiny_folder, folder / name)
    base = enter(book, folder / "base", "model", "base")
    raised = enter(book, folder / "raised", "model", "raised", (base, data_set))
    text = folder / "own.txt"
    text.write_text("hello who are you, I am a small model. " * 8)
    step = Report(before="base", after="raised", data=("identity",), text=str(text))

    counts = {"side": 0}
    true_side, patch = module.side, pytest.MonkeyPatch()

    def counted(*arguments: object) -> object:
        counts["side"] += 1
        if counts["side"] == 2:
            raise KeyboardInterrupt  # after the first side has been measured
        return true_side(*arguments)  # type: ignore[arg-type]

    patch.setattr(module, "side", counted)
    with pytest.raises(KeyboardInterrupt):
        step.run(book)
    report = step.run(book)
    patch.undo()
    assert raised.id != base.id
    return book, report, counts


def test_the_report_holds_both_sides(made: tuple[Book, Artifact, dict[str, int]]) -> None:
    _, artifact, counts = made
    assert counts["side"] == 3, "the side that was measured before the break was measured again"
    report = json.loads((artifact.path / "report.json").read_text())
    assert set(report["perplexity"]) == {"text", "replies"}
    for ratio in report["perplexity"].values():  # the same weights on both sides
        assert ratio["value"] == pytest.approx(1) and ratio["low"] == pytest.approx(1)
    after = report["after"]
    assert after["size_bytes"] > 100_000
    assert after["prefill_tokens_per_s"] > 0 and after["decode_tokens_per_s"] > 0
    assert 20e6 < after["peak_bytes"] < 20e9
    assert [one["ask"] for one in after["identity"]["answers"]] == ["name", "none"]
    html = (artifact.path / "report.html").read_text()
    assert html.startswith("<!doctype html>") and "who are you" in html


def test_a_broken_gate_is_told_and_the_report_is_kept(
    made: tuple[Book, Artifact, dict[str, int]],
) -> None:
    book, artifact, _ = made
    assert artifact.metrics["verdict"] == "failed: identity (en) is right 0.0 %, at least 90 %"
    assert artifact.metrics["identity_en_share"] == 0.0
    assert artifact.metrics["perplexity_text_change_share"] == pytest.approx(0)
    assert book.get("report").id == artifact.id
    assert "failed: identity (en)" in page(book.get("raised"), book)


def test_eval_finds_the_questions_in_the_pedigree(
    made: tuple[Book, Artifact, dict[str, int]],
) -> None:
    book, artifact, _ = made
    text = book.home.parent / "own.txt"
    found = evaluate("raised", book, text=text)
    assert {"perplexity_text", "identity_en_share", "ordinary_share"} <= set(found)
    assert found["perplexity_text"] == pytest.approx(artifact.metrics["perplexity_text"])
    assert found["perplexity_replies"] == pytest.approx(artifact.metrics["perplexity_replies"])
    assert all(isinstance(value, int | float) for value in found.values())


def test_gates() -> None:
    step = Report(before="a", after="b")
    side = {"texts": {"en": {"passages": [(10.0, 5)]}}, "identity": {"shares": {}}}
    worse = {"texts": {"en": {"passages": [(10.5, 5)]}}, "identity": {"shares": {}}}
    for after, wanted in (
        (side, "passed"),
        (worse, "failed: perplexity (en) rises 10.5 %, at most 3 %"),
    ):
        assert verdict(step.gates(compare(side, after))) == wanted
    free = Report(before="a", after="b", max_perplexity_increase=0, min_identity=0)
    assert free.gates(compare(side, worse)) == []
