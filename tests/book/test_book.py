"""The book: ids cover bytes, settings and parents; nothing is entered half."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from herdbook.book import tree
from herdbook.book.book import Book
from herdbook.book.step import Bench, Inputs, Step
from herdbook.book.tree import reports
from herdbook.errors import BookError, CapacityError, UnknownName


@dataclass(frozen=True)
class Write(Step):
    """Write a text."""

    kind: ClassVar[str] = "dataset"
    text: str = "hello"
    sources: Inputs = ()

    def make(self, bench: Bench) -> dict[str, Any]:
        (bench.out / "text.txt").write_text(self.text)
        return {"characters": len(self.text), "right_share": 0.975}


@dataclass(frozen=True)
class Fail(Write):
    def make(self, bench: Bench) -> dict[str, Any]:
        (bench.work / "state").write_text("half way")
        raise OSError(errno.ENOSPC, "No space left on device", str(bench.out))


def rows(book: Book) -> list[tuple[Any, ...]]:
    with sqlite3.connect(book.home / "book.db") as database:
        return [
            row
            for table in ("artifacts", "parents", "names")
            for row in database.execute(f"SELECT * FROM {table}")
        ]


def test_same_step_is_done_once(book: Book) -> None:
    first = Write().run(book)
    before = rows(book)
    assert Write().run(book) == first
    assert rows(book) == before
    assert first.ref == "write@1"


def test_id_covers_bytes_settings_and_parents(book: Book, tmp_path: Path) -> None:
    mother = Write("mother").run(book, name="mother")
    child = Write("child", sources=("mother",)).run(book, name="child")
    orphan = Write("child").run(book, name="child")
    assert child.id != orphan.id
    assert child.parents == (mother.id,)
    assert (child.version, orphan.version) == (1, 2)
    again = Write("child", sources=(Write("mother").run(Book(tmp_path / "other")).id,))
    assert again.resolved(Book(tmp_path / "other")).key() == child.key


def test_going_back_to_older_settings_renames_and_makes_nothing(book: Book) -> None:
    one = Write("one").run(book, name="x")
    Write("two").run(book, name="x")
    back = Write("one").run(book, name="x")
    assert (back.id, back.ref) == (one.id, "x@3")
    assert book.get("x").id == one.id
    assert book.get("x@1").id == one.id
    assert book.get(one.id[:10]).id == one.id


def test_unknown_names_get_the_nearest(book: Book) -> None:
    Write().run(book, name="cria")
    with pytest.raises(UnknownName, match="'crai' is not in the book\n  next: did you mean 'cria'"):
        book.get("crai")
    assert book.find("cria@7") is None
    assert book.find("cria@x") is None


def test_full_disk_is_told_and_leaves_the_book_unchanged(book: Book) -> None:
    Write().run(book)
    before = rows(book)
    with pytest.raises(CapacityError, match="disk is full"):
        Fail().run(book)
    assert rows(book) == before
    assert list((book.home / "work").glob("*/state")), "the step's state is kept for going on"


def test_verify_finds_every_kind_of_change(book: Book) -> None:
    mother = Write("mother").run(book, name="mother")
    child = Write("child", sources=("mother",)).run(book, name="child")
    checked, problems = book.verify("child")
    assert ({one.id for one in checked}, problems) == ({mother.id, child.id}, [])
    (mother.path / "text.txt").write_text("stranger")
    (child.path / "extra").write_text("")
    assert {(one.artifact.name, one.what) for one in book.verify("child")[1]} == {
        ("mother", "file text.txt was changed"),
        ("child", "file extra was added"),
    }
    (child.path / "extra").unlink()
    (child.path / "text.txt").unlink()
    assert "file text.txt is gone" in [one.what for one in book.verify()[1]]
    with sqlite3.connect(book.home / "book.db") as database:
        database.execute("UPDATE artifacts SET config = '{}' WHERE id = ?", (child.id,))
    assert "its entry was changed: the id no longer covers it" in [
        one.what for one in book.verify("child@1")[1]
    ]


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BookError, match="set HERDBOOK_HOME"):
        Book(tmp_path / "file" / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "book.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(BookError, match="cannot be opened"):
        Book(tmp_path / "home")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody without rights")
def test_a_read_only_home_is_told(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/") and "pytest" in str(folder):
            folder.chmod(0o755)
    code = f"import os; from herdbook.book.book import Book; os.setuid(65534); Book({str(home)!r})"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "BookError" in done.stderr and "set HERDBOOK_HOME" in done.stderr


def test_two_herds_do_not_work_on_the_same_step(book: Book) -> None:
    with (
        book.desk("sha256:00ff"),
        pytest.raises(BookError, match="another herd"),
        book.desk("sha256:00ff"),
    ):
        pass


def test_a_newer_book_is_refused(book: Book) -> None:
    with sqlite3.connect(book.home / "book.db") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(BookError, match="version 99"):
        Book(book.home)


def test_a_folder_left_by_a_kill_before_its_entry_is_replaced(book: Book, tmp_path: Path) -> None:
    there = Write().run(Book(tmp_path / "other"))
    left = book.home / "artifacts" / "dataset" / there.short
    left.mkdir(parents=True)
    (left / "half").write_text("")
    made = Write().run(book)
    assert made.path == left
    assert book.verify()[1] == []


def test_the_tree_shows_parents_and_metrics(book: Book) -> None:
    Write("mother").run(book, name="mother")
    child = Write("child", sources=("mother", "mother")).run(book, name="child")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(tree.draw(book, child))
    text = console.export_text()
    assert "child@1" in text and "├── mother@1" in text and "right 97.5 %" in text
    assert [one["ref"] for one in tree.to_mapping(book, child)["parents"]] == ["mother@1"] * 2


def test_revision_is_part_of_the_key() -> None:
    class Newer(Write):
        revision = 2

    Newer.__name__ = "Write"
    assert Newer().key() != Write().key()
    assert replace(Write(), text="x").key() != Write().key()


def test_what_is_damaged_is_made_anew_and_never_used(book: Book) -> None:
    mother = Write("mother").run(book, name="mother")
    child = Write("child", sources=("mother",)).run(book, name="child")
    (mother.path / "text.txt").write_text("stranger")
    with pytest.raises(BookError, match="mother@1 is damaged") as caught:
        Write("grandchild", sources=("mother",)).run(book)
    assert "herd verify mother@1" in str(caught.value)
    shutil.rmtree(child.path)
    assert Write("mother").run(book, name="mother").id == mother.id
    assert Write("child", sources=("mother",)).run(book, name="child").id == child.id
    assert book.verify()[1] == [], "both are as they were"


def test_many_may_open_a_new_home_at_once(tmp_path: Path) -> None:
    code = "import sys; from herdbook.book.book import Book; Book(sys.argv[1]).entries()"
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(6)]
    told = [one.communicate(timeout=60)[1].decode() for one in running]
    assert [one.returncode for one in running] == [0] * 6, told


@pytest.mark.parametrize("ref", ["x@²", "x@99999999999999999999999", "x@"])
def test_odd_versions_are_unknown(book: Book, ref: str) -> None:
    Write().run(book, name="x")
    found = book.find(ref)
    assert found is None or ref == "x@"


def test_entries_stand_in_the_order_of_naming(book: Book) -> None:
    for name in ("a", "b", "a"):
        Write(name).run(book, name="first" if name == "a" else "second")
    Write("c").run(book, name="first")
    Write("a").run(book, name="first")
    assert book.entries()[-1].ref == "first@3", "what was raised last, though made before"


def test_a_report_hangs_under_what_it_judges(book: Book) -> None:
    """Full tuning makes a model between base and result: the report is the result's."""
    base, tune = Write("base").run(book, name="base"), Write("tune").run(book, name="tune")
    result = Write("result", sources=("tune",)).run(book, name="result")
    folder = book.home / "work" / "report"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    told = book.add(
        folder, kind="report", name="report", parents=[base.id, result.id, tune.id], step="Report",
        key="k", config={"before": base.id, "after": result.id}, metrics={}, versions={},
    )  # fmt: skip
    assert [one.id for one in reports(book, result)] == [told.id]
    assert not list(reports(book, tune)) and not list(reports(book, base))
