"""The book itself: SQLite for what is known, folders for the bytes.

    $HERDBOOK_HOME/                      (default ~/.herdbook)
        book.db                          write-ahead log, migrations appended
        artifacts/<kind>/<id16>/…        whole: written elsewhere, synced, renamed
        work/<key16>/                    a step at work; survives a kill, goes when it is done

An artifact is entered in one transaction after its folder has its final name, so a kill at any moment
leaves either nothing or the whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from herdbook.book.hashing import artifact_id, file_hashes
from herdbook.errors import BookError, UnknownName, nearest
from herdbook.files.atomic import sha256_once, sync_folder, sync_tree

KINDS = ("dataset", "tokenizer", "model", "adapter", "report", "index")

# Only ever appended to: entry n brings a book from version n to n + 1.
MIGRATIONS = (
    """
    CREATE TABLE artifacts (
        id TEXT PRIMARY KEY, kind TEXT NOT NULL, step TEXT NOT NULL, key TEXT NOT NULL,
        config TEXT NOT NULL, metrics TEXT NOT NULL, versions TEXT NOT NULL, files TEXT NOT NULL,
        created TEXT NOT NULL);
    CREATE INDEX by_key ON artifacts (key);
    CREATE TABLE parents (
        child TEXT NOT NULL REFERENCES artifacts (id), place INTEGER NOT NULL,
        parent TEXT NOT NULL REFERENCES artifacts (id), PRIMARY KEY (child, place));
    CREATE TABLE names (
        name TEXT NOT NULL, version INTEGER NOT NULL, id TEXT NOT NULL REFERENCES artifacts (id),
        PRIMARY KEY (name, version));
    """,
    """
    CREATE TABLE keys (
        hash TEXT PRIMARY KEY, name TEXT NOT NULL, requests_per_minute INTEGER,
        tokens_per_minute INTEGER, created TEXT NOT NULL, revoked TEXT);
    CREATE UNIQUE INDEX live_keys ON keys (name) WHERE revoked IS NULL;
    """,
)


@dataclass(frozen=True)
class Artifact:
    """One entry: what it is, what it was made of, by which step, and what it is worth."""

    id: str  # 64 hexadecimal digits
    kind: str
    name: str
    version: int
    parents: tuple[str, ...]  # ids, in the order in which the step took them
    step: str
    key: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, str]  # relative path → «sha256:…»
    created: str  # ISO 8601, UTC
    path: Path

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def short(self) -> str:
        return self.id[:16]

    @property
    def size_bytes(self) -> int:
        return sum((self.path / name).stat().st_size for name in self.files)

    def to_mapping(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {
            "ref": self.ref,
            "id": self.id,
            "kind": self.kind,
            "step": self.step,
            "parents": list(self.parents),
            "config": dict(self.config),
            "metrics": dict(self.metrics),
            "versions": dict(self.versions),
            "files": dict(self.files),
            "created": self.created,
            "path": str(self.path),
        }


@dataclass(frozen=True)
class Problem:
    """Something that `verify` found."""

    artifact: Artifact
    what: str


class Book:
    """The register. Opening it creates it."""

    def __init__(self, home: Path | str | None = None) -> None:
        self.home = _home(home)
        try:
            (self.home / "artifacts").mkdir(parents=True, exist_ok=True)
            (self.home / "work").mkdir(exist_ok=True)
            with self.connect() as database:
                self._migrate(database)
        except (OSError, sqlite3.DatabaseError) as error:
            raise BookError(
                f"the book at {self.home} cannot be opened ({error}):",
                rule="Herdbook needs a folder that it can write to",
                next="set HERDBOOK_HOME to a folder of yours",
            ) from error

    @classmethod
    def exists(cls) -> bool:
        """Whether there is a book already where one would be opened."""
        return (_home(None) / "book.db").is_file()

    @contextmanager
    def connect(self) -> Iterator[sqlite3.Connection]:
        """A connection for one piece of work, in one transaction."""
        with closing(sqlite3.connect(self.home / "book.db", timeout=30)) as database:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA foreign_keys = ON")
            with database:
                yield database

    def _migrate(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise BookError(
                f"the book at {self.home} has version {version}",
                rule=f"this Herdbook knows books up to version {len(MIGRATIONS)}",
                next="update Herdbook: pip install -U herdbook",
            )
        if version == len(MIGRATIONS):
            return
        database.execute("PRAGMA journal_mode = WAL")
        with open(self.home / "work" / "migrate.lock", "w") as lock:  # another may be at it
            fcntl.flock(lock, fcntl.LOCK_EX)
            (version,) = database.execute("PRAGMA user_version").fetchone()
            for number in range(version, len(MIGRATIONS)):
                database.executescript(
                    f"BEGIN IMMEDIATE; {MIGRATIONS[number]}; PRAGMA user_version = {number + 1};"
                    "COMMIT"
                )

    # ------------------------------------------------------------------ reading

    def get(self, ref: str) -> Artifact:
        """By name (`cria`: the newest), `cria@2`, id, or a beginning of an id of 6 digits or more."""
        found = self.find(ref)
        if found is None:
            raise UnknownName(
                f"{ref!r}", rule="is not in the book", next=nearest(ref, list(self.names()))
            )
        return found

    def find(self, ref: str) -> Artifact | None:
        """As `get`, None when it is not there."""
        name, _, version = ref.partition("@")
        with self.connect() as database:
            if version and not (version.isascii() and version.isdigit() and len(version) < 10):
                return None
            row = database.execute(
                "SELECT id, name, version FROM names WHERE name = ? AND (? = '' OR version = ?) "
                "ORDER BY version DESC LIMIT 1",
                (name, version, int(version or 0)),
            ).fetchone()
            if row is not None:
                return self._artifact(database, row["id"], row["name"], row["version"])
            if len(ref) < 6 or not all(c in "0123456789abcdef" for c in ref):
                return None
            rows = database.execute(
                "SELECT id FROM artifacts WHERE substr(id, 1, ?) = ? LIMIT 2", (len(ref), ref)
            ).fetchall()
            if len(rows) > 1:
                raise UnknownName(
                    f"{ref!r}", rule="begins several ids", next="give more of its digits"
                )
            return self._artifact(database, rows[0]["id"]) if rows else None

    def by_key(self, key: str, name: str = "") -> Artifact | None:
        """What the step with this key made before; from now on it is (also) the newest `name`, if
        one is given."""
        with self.connect() as database:
            row = database.execute(
                "SELECT id FROM artifacts WHERE key = ? ORDER BY created DESC LIMIT 1", (key,)
            ).fetchone()
            if row is None:
                return None
            if not self.whole(self._artifact(database, row["id"])):
                return None  # it is made anew
            if not name:
                return self._artifact(database, row["id"])
            version = self._name(database, name, row["id"])
            return self._artifact(database, row["id"], name, version)

    def whole(self, artifact: Artifact) -> bool:
        """Whether its files are there, and those that the id covers (read once a process)."""
        return all(
            (artifact.path / name).is_file() and sha256_once(artifact.path / name) == digest
            for name, digest in artifact.files.items()
        )

    def entries(self, kind: str | None = None) -> list[Artifact]:
        """Every name at every version, in the order in which they were given."""
        with self.connect() as database:
            rows = database.execute(
                "SELECT n.id, n.name, n.version FROM names n JOIN artifacts a ON a.id = n.id "
                "WHERE ? IS NULL OR a.kind = ? ORDER BY n.rowid",
                (kind, kind),
            ).fetchall()
            return [self._artifact(database, *row) for row in rows]

    def names(self) -> tuple[str, ...]:
        with self.connect() as database:
            rows = database.execute("SELECT DISTINCT name FROM names ORDER BY name").fetchall()
        return tuple(row["name"] for row in rows)

    def parents(self, artifact: Artifact) -> tuple[Artifact, ...]:
        return tuple(self.get(one) for one in artifact.parents)

    def children(self, artifact: Artifact) -> tuple[Artifact, ...]:
        """What was made directly from it, oldest first."""
        with self.connect() as database:
            rows = database.execute(
                "SELECT DISTINCT a.id, a.created FROM parents p JOIN artifacts a ON a.id = p.child "
                "WHERE p.parent = ? ORDER BY a.created",
                (artifact.id,),
            ).fetchall()
            return tuple(self._artifact(database, row["id"]) for row in rows)

    def ancestors(self, artifact: Artifact) -> Iterator[Artifact]:
        """The artifact itself, then everything it was made from, each once, nearest first."""
        waiting, seen = [artifact], set[str]()
        while waiting:
            one = waiting.pop(0)
            if one.id not in seen:
                seen.add(one.id)
                yield one
                waiting.extend(self.parents(one))

    def _artifact(
        self, database: sqlite3.Connection, id: str, name: str = "", version: int = 0
    ) -> Artifact:
        row = database.execute("SELECT * FROM artifacts WHERE id = ?", (id,)).fetchone()
        if not name:
            name, version = database.execute(
                "SELECT name, version FROM names WHERE id = ? ORDER BY rowid DESC LIMIT 1", (id,)
            ).fetchone()
        parents = database.execute(
            "SELECT parent FROM parents WHERE child = ? ORDER BY place", (id,)
        ).fetchall()
        return Artifact(
            id=id,
            kind=row["kind"],
            name=name,
            version=version,
            parents=tuple(parent["parent"] for parent in parents),
            step=row["step"],
            key=row["key"],
            config=json.loads(row["config"]),
            metrics=json.loads(row["metrics"]),
            versions=json.loads(row["versions"]),
            files=json.loads(row["files"]),
            created=row["created"],
            path=self._place(row["kind"], id),
        )

    def _place(self, kind: str, id: str) -> Path:
        return self.home / "artifacts" / kind / id[:16]

    # ------------------------------------------------------------------ writing

    def add(
        self,
        folder: Path,
        *,
        kind: str,
        name: str,
        parents: list[str],
        step: str,
        key: str,
        config: Mapping[str, Any],
        metrics: Mapping[str, Any],
        versions: Mapping[str, str],
    ) -> Artifact:
        """Enter `folder` as an artifact; the folder moves into the book."""
        assert kind in KINDS, kind
        files = file_hashes(folder)
        id = artifact_id(kind, step, config, parents, files)
        place = self._place(kind, id)
        with self.connect() as database:
            known = database.execute("SELECT 1 FROM artifacts WHERE id = ?", (id,)).fetchone()
            damaged = known is not None and not self.whole(self._artifact(database, id))
        if known is None or damaged:
            sync_tree(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)  # left by a kill before it was entered
            os.replace(folder, place)
            sync_folder(place.parent)
        with self.connect() as database:
            if known is None:
                database.execute(
                    "INSERT INTO artifacts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        id,
                        kind,
                        step,
                        key,
                        *(_json(one) for one in (config, metrics, versions, files)),
                        datetime.now(UTC).isoformat(timespec="microseconds"),
                    ),
                )
                database.executemany(
                    "INSERT INTO parents VALUES (?, ?, ?)",
                    [(id, number, parent) for number, parent in enumerate(parents)],
                )
            else:
                database.execute("UPDATE artifacts SET key = ? WHERE id = ?", (key, id))
            version = self._name(database, name, id)
            return self._artifact(database, id, name, version)

    def _name(self, database: sqlite3.Connection, name: str, id: str) -> int:
        """Make `id` the newest version of `name`; its version number."""
        row = database.execute(
            "SELECT version, id FROM names WHERE name = ? ORDER BY version DESC LIMIT 1", (name,)
        ).fetchone()
        if row is not None and row["id"] == id:
            return int(row["version"])
        version = 1 if row is None else row["version"] + 1
        database.execute("INSERT INTO names VALUES (?, ?, ?)", (name, version, id))
        return int(version)

    @contextmanager
    def desk(self, key: str) -> Iterator[Path]:
        """The working folder of the step with this key, locked; kept if the work did not end well."""
        work = self.home / "work" / key.removeprefix("sha256:")[:16]
        work.mkdir(parents=True, exist_ok=True)
        with open(work.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BookError(
                    "another herd is at work on this very step",
                    rule="and two must not write the same files",
                    next="wait for it, or stop it",
                ) from None
            work.mkdir(parents=True, exist_ok=True)
            yield work
            shutil.rmtree(work)

    # ------------------------------------------------------------------ checking

    def verify(self, ref: str | None = None) -> tuple[list[Artifact], list[Problem]]:
        """Recompute the hashes of one artifact with its ancestors, or of the whole book."""
        if ref is None:
            checked = list({artifact.id: artifact for artifact in self.entries()}.values())
        else:
            checked = list(self.ancestors(self.get(ref)))
        return checked, [problem for artifact in checked for problem in self._check(artifact)]

    def _check(self, artifact: Artifact) -> Iterator[Problem]:
        if not artifact.path.is_dir():
            yield Problem(artifact, f"its folder {artifact.path} is gone")
            return
        found = file_hashes(artifact.path)
        for name in sorted(found.keys() | artifact.files.keys()):
            if name not in found:
                yield Problem(artifact, f"file {name} is gone")
            elif name not in artifact.files:
                yield Problem(artifact, f"file {name} was added")
            elif found[name] != artifact.files[name]:
                yield Problem(artifact, f"file {name} was changed")
        again = artifact_id(
            artifact.kind, artifact.step, artifact.config, list(artifact.parents), artifact.files
        )
        if again != artifact.id:
            yield Problem(artifact, "its entry was changed: the id no longer covers it")


def _home(given: Path | str | None) -> Path:
    place = given or os.environ.get("HERDBOOK_HOME") or "~/.herdbook"
    return Path(place).expanduser().absolute()


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), ensure_ascii=False)
