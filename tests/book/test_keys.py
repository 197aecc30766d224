"""API keys: shown once, kept as hashes, revoked for good; books from before keys get their table."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from herdbook.book.book import MIGRATIONS, Book
from herdbook.book.keys import Keys, hash_key
from herdbook.errors import ConfigError, UnknownName


def test_the_book_never_holds_a_key(book: Book) -> None:
    key = Keys(book).add("alice", tokens_per_minute=1000)
    (known,) = Keys(book).all()
    assert known.hash == hash_key(key) and len(known.hash) == 64
    assert (known.requests_per_minute, known.tokens_per_minute) == (None, 1000)
    assert "hash" not in known.to_mapping()
    for file in book.home.glob("book.db*"):
        assert key.encode() not in file.read_bytes()


def test_a_revoked_name_is_free_again(book: Book) -> None:
    keys = Keys(book)
    first = keys.add("alice")
    with pytest.raises(ConfigError, match="has a key already"):
        keys.add("alice")
    keys.revoke("alice")
    with pytest.raises(UnknownName):
        keys.revoke("alice")
    assert keys.all(live=True) == []
    second = keys.add("alice")
    assert second != first
    assert [bool(key.revoked) for key in keys.all()] == [True, False]


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "x" * 65, "ab\x00"])
def test_names(book: Book, name: str) -> None:
    with pytest.raises(ConfigError):
        Keys(book).add(name)
    assert Keys(book).all() == []


def test_a_book_from_before_keys_is_brought_on(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "book.db") as database:
        database.executescript(f"{MIGRATIONS[0]}; PRAGMA user_version = 1")
    assert Keys(Book(tmp_path)).all() == []
