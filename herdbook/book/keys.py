"""API keys of the server. The book keeps their hashes, never the keys.

A key is 256 random bits, so a single SHA-256 hides it: there is no word list to try, and salt would
guard nothing. Its name says whose it is; a revoked key stays in the list, and its name is free again.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from herdbook.book.book import Book
from herdbook.errors import ConfigError, UnknownName, nearest

NAME = re.compile(r"[\w.@+-]{1,64}")


@dataclass(frozen=True)
class Key:
    """What is known of one key. Limits: None where there is none."""

    hash: str  # SHA-256 of the key, hexadecimal
    name: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created: str  # ISO 8601, UTC
    revoked: str | None

    def to_mapping(self) -> dict[str, Any]:
        """Plain data, for --json; without the hash."""
        return {name: value for name, value in vars(self).items() if name != "hash"}


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys of a book."""

    def __init__(self, book: Book) -> None:
        self.book = book

    def add(
        self,
        name: str,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> str:
        """A new key. It is returned here and can never be read again."""
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"the name {name!r}",
                rule="must be 1 to 64 letters, digits or any of . _ @ + -",
                next="herd keys add alice",
            )
        for what, limit in (("requests", requests_per_minute), ("tokens", tokens_per_minute)):
            if limit is not None and limit < 1:
                raise ConfigError(
                    f"{what}={limit} a minute",
                    rule="must be at least 1",
                    next="leave it out for no limit; herd keys revoke ends a key",
                )
        key = "herd-" + secrets.token_urlsafe(32)
        row = (hash_key(key), name, requests_per_minute, tokens_per_minute, _now(), None)
        try:
            with self.book.connect() as database:
                database.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError as error:
            raise ConfigError(
                f"the name {name!r}",
                rule="has a key already",
                next=f"choose another name, or first: herd keys revoke {name}",
            ) from error
        return key

    def all(self, *, live: bool = False) -> list[Key]:
        """Every key in the order in which they were made. live: without the revoked ones."""
        with self.book.connect() as database:
            rows = database.execute(
                "SELECT * FROM keys WHERE NOT ? OR revoked IS NULL ORDER BY rowid", (live,)
            ).fetchall()
        return [Key(*row) for row in rows]

    def revoke(self, name: str) -> None:
        """End the key of this name; a running server refuses it within seconds."""
        with self.book.connect() as database:
            changed = database.execute(
                "UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL", (_now(), name)
            ).rowcount
        if not changed:
            known = [key.name for key in self.all(live=True)]
            raise UnknownName(f"{name!r}", rule="has no key", next=nearest(name, known))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
