from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from herdbook.data import records
from herdbook.data.records import Conversation
from herdbook.errors import DataError
from herdbook.tokens import corpus


def test_files_and_datasets_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("三".encode()))
    rows = [{"instruction": "Add.", "input": "2 and 3", "output": "5"}]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    data = tmp_path / "dataset"
    data.mkdir()
    records.write(data / "train.jsonl", [Conversation.of("Hi", "Hello!")])
    records.write(data / "heldout.jsonl", [Conversation.of("Who?", "Luna.")])
    files = [tmp_path / name for name in ("a.txt", "b.txt.gz", "c.json", "d.jsonl.gz")]
    found = corpus.read(files, [data])
    assert found.texts == ["one\n\ntwo\n", "三"]
    assert len(found.talks) == 4
    assert list(found)[2:4] == ["Add.\n\n2 and 3", "5"]
    assert set(found.lines()) >= {"one", "two", "三", "Hi", "Hello!", "Luna."}
    assert "" not in found.lines()


def test_what_holds_no_text_is_refused(tmp_path: Path) -> None:
    def message(name: str) -> str:
        with pytest.raises(DataError) as caught:
            corpus.read([tmp_path / name])
        return str(caught.value)

    (tmp_path / "blank.txt").write_text(" \n\n")
    assert "blank.txt holds no text" in message("blank.txt")
    assert "none.txt is not there" in message("none.txt")
    (tmp_path / "folder.txt").mkdir()
    assert "is a folder; expected a file" in message("folder.txt")
    (tmp_path / "gb.txt").write_bytes("第一行\n中文".encode("gb18030"))
    assert "gb.txt, line 1: byte 0xb5 is not UTF-8" in message("gb.txt")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"text" * 99)[:-9])
    assert "is a broken gzip file" in message("cut.gz")
    (tmp_path / "poems.jsonl").write_text('{"author": "李白"}\n')
    assert "where Alpaca" in message("poems.jsonl")
    with pytest.raises(DataError, match="nothing holds no text"):
        corpus.read()
