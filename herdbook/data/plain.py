"""Plain text as a dataset in the book: documents to learn a language from.

    {"text": "Four score and seven years ago our fathers brought forth …"}     a line of train.jsonl

======================= =============================================================================
notes.txt, notes.txt.gz cut at blank lines into documents of about `size` characters, so that a book
                        gives many; nothing is left out, and no paragraph is cut in two
rows.jsonl(.gz)         {"text": …} a line, each a document
======================= =============================================================================

Files are read line by line, twice (once to count), so their size does not matter.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.step import Bench, Step, require
from herdbook.data import records
from herdbook.data.records import Document
from herdbook.data.rows import lines, need_file
from herdbook.errors import ConfigError, DataError
from herdbook.files.atomic import sha256_once

#: documents that are held out, at most
HELDOUT = 200


@dataclass(frozen=True)
class Text(Step):
    """Read plain text (.txt, or JSON lines with "text"; .gz), as documents to learn a language from."""

    kind: ClassVar[str] = "dataset"
    #: the files
    data: tuple[str, ...] = ()
    #: about how many characters of a .txt make a document
    size: int = 2000
    limit: int = 0  # at most so many documents, drawn by seed; 0: all
    heldout: float = 0.02  # the share that is kept from training, at most 200 documents
    seed: int = 0

    def fingerprint(self) -> dict[str, str]:
        there = [(n, Path(one)) for n, one in enumerate(self.data) if Path(one).is_file()]
        return {str(number): sha256_once(path) for number, path in there}

    def check(self) -> None:
        require(self, "data", "size")
        for one in self.data:
            need_file(Path(one))
        if not 0 <= self.heldout < 1 or self.limit < 0 or self.size < 0:
            raise ConfigError(
                f"heldout = {self.heldout}, limit = {self.limit}, size = {self.size}",
                rule="but heldout is a share from 0 to below 1, and the others are no less than 0",
                next="leave them out, or try heldout 0.02, limit 0, size 2000",
            )

    def make(self, bench: Bench) -> dict[str, Any]:
        total = sum(1 for _ in self._documents())
        if not total:
            raise DataError(
                f"{', '.join(self.data)}", rule="holds no text", next="give a file that does"
            )
        order = list(range(total))
        random.Random(self.seed).shuffle(order)
        chosen = order[: self.limit or None]
        count = min(round(len(chosen) * self.heldout), HELDOUT, len(chosen) - 1)
        if self.heldout and not count and len(chosen) > 1:
            count = 1
        held, wanted = set(chosen[:count]), set(chosen)
        characters = 0
        with (
            (bench.out / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train,
            (bench.out / "heldout.jsonl").open("w", encoding="utf-8", newline="\n") as heldout,
        ):
            for number, text in enumerate(self._documents()):
                if number in wanted:
                    (heldout if number in held else train).write(records.line(Document(text)))
                    characters += len(text)
        if not held:
            (bench.out / "heldout.jsonl").unlink()
        return {
            "documents": len(wanted) - len(held),
            "heldout": len(held),
            "characters": characters,
            "found_documents": total,
        }

    def _documents(self) -> Iterator[str]:
        """Every document once: of repeated ones the first."""
        seen = set[bytes]()
        for file in map(Path, self.data):
            rows = Path(file.name.removesuffix(".gz")).suffix in (".json", ".jsonl")
            for text in _rows(file) if rows else _passages(file, self.size):
                mark = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if text.strip() and mark not in seen:
                    seen.add(mark)
                    yield text


def _rows(path: Path) -> Iterator[str]:
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: {line.strip()[:60]!r}",
                rule='is no JSON object with "text", one a line',
                next="mend or take out that row; conversations are read by the step Import",
            ) from error
        yield text


def _passages(path: Path, size: int) -> Iterator[str]:
    """Paragraphs put together until they have `size` characters."""
    held, characters = list[str](), 0
    for line in lines(path):
        if not line.strip() and characters >= size:
            yield "".join(held).strip("\r\n")
            held, characters = [], 0
        else:
            held.append(line)
            characters += len(line)
    yield "".join(held).strip("\r\n")
