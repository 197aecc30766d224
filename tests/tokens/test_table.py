"""Tables: the rows that rendering gives, from a cache that knows when it is another's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from herdbook.data import records
from herdbook.data.records import Conversation, Document
from herdbook.errors import TemplateError
from herdbook.tokens import table
from herdbook.tokens.chat import render
from herdbook.tokens.documents import windows
from herdbook.tokens.tokenizer import Tokenizer

ROWS = [
    Conversation.of("who are you", "I am a model"),
    Conversation.of("hello", "你好", "who", "a small model", learn="keep"),
    Document("hello who are you I am a small model " * 9),
    *(Conversation.of(f"say {n}", f"{n}" * (n % 5 + 1)) for n in range(9)),
]


@pytest.fixture
def made(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    records.write(tmp_path / "train.jsonl", ROWS)
    return {
        "dataset": tmp_path / "train.jsonl",
        "id": "sha256:1",
        "tokenizer": Tokenizer.load(tiny_folder),
        "model": tiny_folder,
        "length": 40,
        "cache": tmp_path / "cache",
    }


def folders(made: dict[str, Any]) -> list[Path]:
    return [one for one in made["cache"].iterdir() if one.is_dir()]


@pytest.mark.parametrize("processes", [1, 3])
def test_the_rows_are_those_of_rendering(
    made: dict[str, Any], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "LINES", len(ROWS) // processes)
    monkeypatch.setattr(table.os, "cpu_count", lambda: processes)
    found = table.tabulate(**made)
    wanted: list[tuple[int, int, Any]] = []
    for line, row in enumerate(ROWS, 1):
        if isinstance(row, Document):
            parts = windows(made["tokenizer"], row.text, 40)
            assert len(parts) > 1
            wanted += [(line, table.TEXT, part) for part in parts]
        else:
            kind = table.KEEP if "learn" in row.extra else table.TALK
            wanted.append((line, kind, render(made["tokenizer"], row.messages)))
    assert len(found) == len(wanted)
    for n, (line, kind, row) in enumerate(wanted):
        assert (found[n], found.lines[n], found.kinds[n]) == (row, line, kind)
        assert found.sizes[n] == len(row.ids)
    assert len(folders(made)) == 1


def test_only_another_dataset_tokenizer_or_length_is_rendered_again(
    made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = table.tabulate(**made)
    monkeypatch.setattr(table, "_make", lambda *rest: pytest.fail("rendered again"))
    assert list(table.tabulate(**made)) == list(first)
    other = Tokenizer.load(made["model"], "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for change in ({"id": "sha256:2"}, {"length": 41}, {"tokenizer": other}):
        with pytest.raises(pytest.fail.Exception, match="rendered again"):
            table.tabulate(**{**made, **change})
    assert len(folders(made)) == 1, "what failed left nothing"


def test_the_least_used_tables_go(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KEPT", 2)
    for length in (30, 40, 50):
        table.tabulate(**{**made, "length": length})
    assert len(folders(made)) == 2


def test_what_a_killed_process_left_is_in_nobody_s_way(
    made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the next process has the same number, as in a container that starts again."""
    (place,) = [table.tabulate(**made), *folders(made)][1:]
    shutil.rmtree(place)
    for name in (f".{place.name}.{os.getpid()}.tmp", "tmpabc.tmp"):
        (made["cache"] / name).mkdir()
        (made["cache"] / name / "ids").write_bytes(b"half")
    monkeypatch.setattr(table, "LINES", 4)
    monkeypatch.setattr(table.os, "cpu_count", lambda: 2)
    right, seen = table.tempfile.TemporaryDirectory, list[str]()

    def noted(**more: Any) -> Any:
        made_one = right(**more)
        seen.append(made_one.name)
        return made_one

    monkeypatch.setattr(table.tempfile, "TemporaryDirectory", noted)
    table.tabulate(**made)
    assert folders(made) == [place]
    parts = [one for one in seen if Path(one).parent == made["cache"]]
    assert parts and all(one.endswith(".tmp") for one in parts)


def test_a_row_that_cannot_be_rendered_is_told_from_another_process_too(
    made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Conversation.of("hello", "you", system="x" * 3)
    records.write(made["dataset"], [*ROWS, bad])
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}"
        "{% endif %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    made["tokenizer"] = Tokenizer.load(made["model"], template)
    monkeypatch.setattr(table, "LINES", 4)
    monkeypatch.setattr(table.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(table.sys, "executable", "/bin/false")
    with pytest.raises(TemplateError, match="none"):
        table.tabulate(**made)
    assert not folders(made)


def test_windows_teach_each_token_once(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    text = "hello who are you 你好 " * 7
    whole = [*tokenizer.prompt(text), tokenizer.eos_id]
    for length in (2, 5, len(whole) - 1, len(whole), len(whole) + 1):
        rows = windows(tokenizer, text, length)
        targets = [id for row in rows for id in row.ids[1:]]
        assert [rows[0].ids[0], *targets] == whole
        assert all(len(row.ids) <= length and all(row.mask) for row in rows)
