"""Rows of token ids on disk, made once and read through memory maps: a million take no memory.

    ids    int32    every row's tokens, one row after another
    mask   uint8    1 where the loss is
    ends   int64    where each row ends in the two above
    lines  int64    the line of the dataset that it is from
    kinds  uint8    how it is learnt: TALK, KEEP (a conversation to stay what the base is on), TEXT

`tabulate` keeps a table under the hash of what decides its bytes (dataset, tokenizer with its template,
length), and writes a long dataset in several processes. The folder is a cache: it may be deleted at any
time. Any row is reached at once by its number, so a run goes on exactly where it was, on however many
processes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from herdbook.book.hashing import digest, file_hashes
from herdbook.data import records
from herdbook.files.atomic import new_folder
from herdbook.tokens.chat import Rendering, render
from herdbook.tokens.documents import windows
from herdbook.tokens.tokenizer import Tokenizer

#: raised when the same rows would now be rendered otherwise
REVISION = 1
#: tables that are kept, the latest used
KEPT = 24
#: lines that are worth a process of their own
LINES = 4_000
TALK, KEEP, TEXT = 0, 1, 2
COLUMNS = {"ids": "<i4", "mask": "u1", "ends": "<i8", "lines": "<i8", "kinds": "u1"}


class Table:
    """The rows of one dataset, in its order."""

    def __init__(self, folder: Path) -> None:
        read = partial(_column, folder)
        #: of a table from the cache, the hash of what decides its bytes
        self.key = folder.name
        self.ids, self.mask, self.ends = read("ids"), read("mask"), read("ends")
        self.lines, self.kinds = read("lines"), read("kinds")

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> Rendering:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start, end = (int(self.ends[number - 1]) if number else 0), int(self.ends[number])
        return Rendering(self.ids[start:end].tolist(), self.mask[start:end].astype(bool).tolist())


def _column(folder: Path, name: str) -> np.ndarray:
    path = folder / name
    if not path.stat().st_size:
        return np.zeros(0, COLUMNS[name])
    return np.memmap(path, COLUMNS[name], mode="r")


def tabulate(
    dataset: Path, id: str, tokenizer: Tokenizer, *, model: Path, length: int, cache: Path
) -> Table:
    """The table of a dataset, from the cache where it is there.

    dataset: its train.jsonl; id: what its bytes are known by; model: where `tokenizer` can be loaded
    from; length: tokens at which a document goes on in the next row (conversations are kept whole).
    """
    key = digest(
        {"dataset": id, "tokenizer": fingerprint(tokenizer), "length": length, "revision": REVISION}
    )
    place = cache / key.removeprefix("sha256:")[:24]
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of one training, the first makes it
        if place.is_dir():
            os.utime(place)
        else:
            _forget(cache, KEPT - 1)  # first: what a killed process left may have this one's number
            with new_folder(place) as folder:
                _make(dataset, tokenizer, model, length, folder)
        return Table(place)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of all that a tokenizer writes down of itself, its chat template included."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        stops = [sorted(tokenizer.stop_ids), sorted(tokenizer.stop_strings)]
        return digest([file_hashes(Path(folder)), tokenizer.chat_template, stops])


def _forget(cache: Path, kept: int) -> None:
    """Take out all but so many tables, those that were not used for longest, and what killed processes
    left."""
    folders = sorted((f for f in cache.iterdir() if f.is_dir()), key=lambda f: -f.stat().st_mtime)
    for number, folder in enumerate(folders):
        if number >= kept or folder.suffix == ".tmp":
            shutil.rmtree(folder)


def _make(dataset: Path, tokenizer: Tokenizer, model: Path, length: int, folder: Path) -> None:
    """Write a table's columns, in several processes where the dataset is long."""
    with dataset.open("rb") as file:
        lines = sum(1 for _ in file)
    count = max(1, min(os.cpu_count() or 1, lines // LINES))
    cuts = [lines * n // count for n in range(count + 1)]
    with tempfile.TemporaryDirectory(suffix=".tmp", dir=folder.parent) as parts:
        others = [
            subprocess.Popen(
                _command(model, dataset, length, start, end, Path(parts) / str(start)),
                stderr=subprocess.DEVNULL,  # a part that fails is made here, where its error is told
            )
            for start, end in pairwise(cuts[1:])
        ]
        try:
            write(_rows(dataset, tokenizer, length, 0, cuts[1]), folder)
            for (start, end), other in zip(pairwise(cuts[1:]), others, strict=True):
                part = Path(parts) / str(start)
                if other.wait():
                    part = part.with_suffix(".again")
                    part.mkdir()
                    write(_rows(dataset, tokenizer, length, start, end), part)
                _append(Table(part), folder)
        finally:
            for other in others:
                other.kill()
                other.wait()


def _command(*arguments: object) -> list[str]:
    """This module as a program, which writes a part of a table."""
    assert __spec__ is not None
    return [sys.executable, "-m", __spec__.name, *map(str, arguments)]


def _rows(
    dataset: Path, tokenizer: Tokenizer, length: int, start: int, end: int
) -> Iterator[tuple[int, int, Rendering]]:
    """(line, kind, row) of the dataset's lines from `start` to before `end`, counted from 0."""
    for line, row in enumerate(islice(records.stream(dataset), start, end), start + 1):
        if isinstance(row, records.Document):
            for part in windows(tokenizer, row.text, length):
                yield line, TEXT, part
        else:
            kind = KEEP if row.extra.get("learn") == "keep" else TALK
            yield line, kind, render(tokenizer, row.messages)


def write(rows: Iterator[tuple[int, int, Rendering]], folder: Path) -> None:
    """Columns of the rows, a row at a time."""
    at = 0
    files = {name: (folder / name).open("wb") for name in COLUMNS}
    try:
        for line, kind, row in rows:
            at += len(row.ids)
            values = {"ids": row.ids, "mask": row.mask, "ends": at, "lines": line, "kinds": kind}
            for name, value in values.items():
                files[name].write(np.asarray(value, COLUMNS[name]).tobytes())
    finally:
        for file in files.values():
            file.close()


def _append(more: Table, folder: Path) -> None:
    """Put a table's rows behind those of the table in `folder`."""
    before = Table(folder)
    columns = {name: getattr(more, name) for name in COLUMNS}
    columns["ends"] = more.ends + (int(before.ends[-1]) if len(before) else 0)
    for name, values in columns.items():
        with (folder / name).open("ab") as file:
            file.write(np.ascontiguousarray(values, COLUMNS[name]).data)


if __name__ == "__main__":
    model, dataset, length, start, end, out = sys.argv[1:]
    Path(out).mkdir()
    made = _rows(Path(dataset), Tokenizer.load(Path(model)), int(length), int(start), int(end))
    write(made, Path(out))
