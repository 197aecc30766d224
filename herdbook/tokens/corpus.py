"""The user's text, as tokenizers are trained, pruned and measured on it: files or datasets of the book.

notes.txt, notes.txt.gz         plain text, UTF-8
chats.json, chats.jsonl(.gz)    conversations, in any format that `herd raise` reads
my-data@1                       a dataset of the book
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from herdbook.book.step import Bench, Inputs, Step
from herdbook.data import formats, records
from herdbook.data.records import Conversation
from herdbook.errors import ConfigError, DataError
from herdbook.files.atomic import sha256_once

ROWS = (".json", ".jsonl")
PASSAGE = 4_000  # characters


@dataclass
class Corpus:
    texts: list[str] = field(default_factory=list)  # whole files
    talks: list[Conversation] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        """Every text and every message."""
        yield from self.texts
        for talk in self.talks:
            yield from (message.content for message in talk.messages)

    def lines(self) -> Iterator[str]:
        return (line for text in self for line in text.split("\n") if line.strip())

    def passages(self) -> Iterator[str]:
        """All the text in parts of at most PASSAGE characters, cut at a newline or blank if there is
        one: trainers take a line of a million characters for a word of that length."""
        for text in self:
            at = 0
            while at < len(text):
                end = at + PASSAGE
                if end < len(text):
                    cut = max(text.rfind("\n", at, end), text.rfind(" ", at, end))
                    end = cut if cut > at else end
                yield text[at:end]
                at = end


def read(files: Sequence[Path | str] = (), datasets: Sequence[Path] = ()) -> Corpus:
    """files: of the user; datasets: folders that a step wrote. DataError when all hold no text."""
    corpus = Corpus()
    for file in map(Path, files):
        need_file(file)
        if Path(file.name.removesuffix(".gz")).suffix in ROWS:
            corpus.talks += formats.read(file)
        else:
            corpus.texts.append(read_text(file))
    for folder in datasets:
        for path in sorted(folder.glob("*.jsonl")):
            for row in records.stream(path):
                if isinstance(row, records.Document):
                    corpus.texts.append(row.text)
                else:
                    corpus.talks.append(row)
    if not any(text.strip() for text in corpus):
        names = ", ".join(map(str, [*files, *datasets])) or "nothing"
        raise DataError(
            f"{names}", rule="holds no text", next="give a text file or a dataset that does"
        )
    return corpus


def need_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(
            f"{path}",
            rule="is a folder; expected a file" if path.is_dir() else "is not there",
            next="give a text file, a file of conversations, or a dataset of the book",
        )


def read_text(path: Path) -> str:
    """A file's characters: unpacked, decoded, without a byte order mark."""
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}", rule=f"is a broken gzip file ({error})", next="fetch or pack it again"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {data[: error.start].count(10) + 1}: byte 0x{data[error.start]:02x}",
            rule="is not UTF-8; text must be UTF-8",
            next=f"iconv -f GB18030 -t UTF-8 {path.name} > utf8.txt, or whatever the encoding is",
        ) from error


@dataclass(frozen=True)
class TextStep(Step):
    """A step that reads the user's text."""

    #: files of text or of conversations
    text: tuple[str, ...] = ()
    #: datasets of the book
    data: Inputs = ()

    def fingerprint(self) -> dict[str, str]:
        files = (Path(one) for one in self.text)
        return {str(number): sha256_once(one) for number, one in enumerate(files) if one.is_file()}

    def check(self) -> None:
        if not self.text and not self.data:
            raise ConfigError(
                f"{type(self).__name__.lower()} has no text",
                rule="but needs the text that the tokenizer is for",
                next="give a text file, or a dataset of the book",
            )
        for one in self.text:
            need_file(Path(one))

    def corpus(self, bench: Bench) -> Corpus:
        return read(self.text, [artifact.path for artifact in bench.inputs["data"]])
