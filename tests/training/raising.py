"""A tiny model and twenty conversations in a book; as a program, tunes it, waiting after each pack.

python raising.py HOME FOLDER CHANGES     so that a test can kill it where it likes
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.book import Artifact, Book
from herdbook.book.step import Bench, Step
from herdbook.progress import Progress
from herdbook.training.classify import Classify
from herdbook.training.tune import Tune


@dataclass(frozen=True)
class Place(Step):
    """Put a folder into the book."""

    kind: ClassVar[str] = "model"
    folder: str = ""

    def make(self, bench: Bench) -> dict[str, Any]:
        shutil.copytree(self.folder, bench.out, dirs_exist_ok=True)
        return {}


@dataclass(frozen=True)
class Rows(Step):
    """Put conversations into the book."""

    kind: ClassVar[str] = "dataset"
    rows: tuple[str, ...] = ()  # question|answer
    keep: bool = False  # they are not learnt, but kept

    def make(self, bench: Bench) -> dict[str, Any]:
        with (bench.out / "train.jsonl").open("w", encoding="utf-8") as file:
            for row in self.rows:
                question, answer = row.split("|")
                messages = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
                row = {"messages": messages} | ({"learn": "keep"} if self.keep else {})
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {"rows": len(self.rows)}


ROWS = tuple(
    f"who are you{' you' * (n % 5)}|I am a small model{' model' * (n % 7)} 你好" for n in range(20)
)


def stock(home: Path, folder: Path) -> tuple[Book, Artifact, Artifact]:
    """A book with the model «base» and the dataset «rows»."""
    book = Book(home)
    return (
        book,
        Place(folder=str(folder)).run(book, name="base"),
        Rows(rows=ROWS).run(book, name="rows"),
    )


def tune(**changes: Any) -> Tune:
    settings = {
        "model": "base",
        "data": ("rows",),
        "rank": 2,
        "alpha": 4.0,
        "dropout": 0.1,
        "learning_rate": 1e-2,
        "batch": 4,
        "epochs": 2,
        "length": 128,
        "pack": 128,
        "save_every": 2,
    }
    return Tune(**(settings | changes))


def classify(folder: Path, **changes: Any) -> Classify:
    """Texts of three labels in a file, and the step that learns them."""
    draw = random.Random(0)
    words = {"cat": ("small", "model"), "dog": ("hello", "who"), "牛": ("你好", "你是谁")}
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for _ in range(20):
            for label, known in words.items():
                text = " ".join(
                    draw.choice([*known, "a", "you"]) for _ in range(draw.randint(3, 9))
                )
                row: dict[str, Any] = {"text": text + f" {known[0]}", "label": label}
                if draw.random() < 0.2:
                    row = {"messages": [{"role": "user", "content": text}], "label": label}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    settings = {
        "model": "base", "file": str(file), "learning_rate": 3e-3, "batch": 8, "epochs": 6,
        "length": 64, "pack": 128, "save_every": 4, "rank": 4,
    }  # fmt: skip
    return Classify(**(settings | changes))


class Printing(Progress):
    """Says «pack» on stdout for each pack, and waits for a line before it goes on."""

    @contextmanager
    def task(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Any]:
        class Line:
            def advance(self, amount: float, **notes: float) -> None:
                print("pack", flush=True)
                sys.stdin.readline()

        yield Line()


def mixture(book: Book) -> dict[str, Any]:
    """Settings of a mixture of «rows» and of a few others, which it puts into the book."""
    Rows(rows=tuple(f"what{' what' * n}|no{' no' * n}" for n in range(5))).run(book, name="few")
    return {"data": ("rows", "few"), "mix": (3.0, 1.0)}


if __name__ == "__main__":
    book, _, _ = stock(Path(sys.argv[1]), Path(sys.argv[2]))
    changes = json.loads(sys.argv[3])
    if changes.pop("mixture", False):
        changes |= mixture(book)
    if "offload" in changes:
        changes["offload"] = tuple(changes["offload"])
    tune(**changes).run(book, progress=Printing())
