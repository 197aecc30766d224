"""A classifier's run that is stopped and goes on, and rows and settings that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from raising import classify, stock
from test_resume import Interrupting, files

from herdbook.errors import ConfigError, DataError


def test_a_run_that_was_stopped_ends_in_the_same_bytes(tmp_path: Path, tiny_folder: Path) -> None:
    book, _, _ = stock(tmp_path / "home", tiny_folder)
    one = classify(tmp_path, method="freeze", last_layers=1, epochs=2, save_every=2)
    whole = one.run(book)
    other, _, _ = stock(tmp_path / "other", tiny_folder)
    progress = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        one.run(other, progress=progress)
    resumed = one.run(other, progress=progress)
    assert any(line.startswith("going on after step") for line in progress.said)
    assert files(resumed.path) == files(whole.path)


def test_what_cannot_be(tmp_path: Path, tiny_folder: Path) -> None:
    book, _, _ = stock(tmp_path / "home", tiny_folder)
    for how in ({"method": "prefix"}, {"base": "nf4"}):
        with pytest.raises(ConfigError, match="is a model of its own"):
            classify(tmp_path, **how).run(book)
    wrong = tmp_path / "wrong.jsonl"
    for line, match in (
        ('{"text": "a"}', "line 1: .* is no text with a label"),
        ('{"text": "a", "label": "x"}', "to tell apart there must be two"),
    ):
        wrong.write_text(line)
        with pytest.raises(DataError, match=match):
            classify(tmp_path, file=str(wrong)).run(book)
    with pytest.raises(DataError, match="is no file"):
        classify(tmp_path, file=str(tmp_path / "none")).run(book)
