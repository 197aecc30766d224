"""Plain text: documents cut at blank lines, none lost, and files of any size read line by line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from herdbook.book.book import Book
from herdbook.data import records
from herdbook.data.plain import Text
from herdbook.data.records import Conversation, Document
from herdbook.errors import ConfigError, DataError


def texts(path: Path) -> list[str]:
    return [row.text for row in records.stream(path) if isinstance(row, Document)]


def paragraphs(count: int) -> str:
    return "\n\n".join(f"Paragraph {n},\nof two lines. 你好\u2028still it." for n in range(count))


@pytest.mark.parametrize("packed", [False, True])
def test_a_text_is_cut_at_blank_lines_and_nothing_is_lost(
    book: Book, tmp_path: Path, packed: bool
) -> None:
    whole = paragraphs(40)
    path = tmp_path / ("notes.txt.gz" if packed else "notes.txt")
    path.write_bytes(gzip.compress(whole.encode()) if packed else whole.encode())
    made = Text(data=(str(path),), size=100, heldout=0).run(book)
    found = texts(made.path / "train.jsonl")
    assert "\n\n".join(found) == whole
    assert len(found) > 5 and all(100 <= len(one) < 200 for one in found[:-1])
    assert made.metrics["documents"] == len(found)
    assert made.metrics["characters"] == sum(map(len, found))


def test_rows_with_text_are_documents_of_their_own(book: Book, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"Text {n}\n\nand more.", "source": "x"} for n in range(50)] * 2
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    made = Text(data=(str(path),), heldout=0.1).run(book)
    train, held = (texts(made.path / f"{part}.jsonl") for part in ("train", "heldout"))
    assert (len(train), len(held)) == (45, 5), "repeated ones came once"
    assert sorted(train + held) == sorted({row["text"] for row in rows})
    few = Text(data=(str(path),), limit=9, heldout=0).run(book, name="few")
    assert len(texts(few.path / "train.jsonl")) == 9
    assert not (few.path / "heldout.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"txt": "b"}', 'line 2: .* is no JSON object with "text"'),
        ("rows.jsonl", b'{"text": "\\ud83e"}', "line 1"),
        ("rows.jsonl", b'{"text": 3}', "line 1"),
        (
            "notes.txt",
            b"good\n\xff\xfe",
            "line 2: byte 0xff\n  rule: is not UTF-8|0xff is not UTF-8",
        ),
        ("notes.txt.gz", gzip.compress(b"a\n" * 999)[:-9], "breaks off"),
        ("notes.txt", b"\n \n", "holds no text"),
    ],
)
def test_bad_files_are_refused_by_line(
    book: Book, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Text(data=(str(tmp_path / name),)).run(book)
    assert book.entries() == []


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for change in ({"heldout": 1.0}, {"limit": -1}, {"size": -5}, {"data": ()}):
        with pytest.raises(ConfigError):
            Text(**{"data": (str(tmp_path / "a.txt"),), **change}).check()


def test_conversations_are_not_read_where_documents_stand(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [Conversation.of("Hi", "Hello"), Document("Once upon a time")]
    records.write(path, rows)
    assert list(records.stream(path)) == rows
    with pytest.raises(DataError, match="is a document, where conversations were expected"):
        records.read(path)
