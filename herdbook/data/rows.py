"""A foreign file's rows, one at a time: JSONL or one JSON array, plain or gzip, of any size.

    bytes ─unpacked─> bytes ─decoded─> text ─a window of it─> (line, place in words, value)

What is in memory is a piece of the file and the row at hand. The first fault that is met ends it, and
names its line.
"""

from __future__ import annotations

import codecs
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from herdbook.errors import DataError

#: bytes that are read, and that are unpacked, at once
PIECE = 1 << 20
#: a fault so many characters before the end of what was read is none of its being cut there
CUT = 16
EXPECTED = (
    "where Alpaca (instruction, input, output), ShareGPT (conversations) or OpenAI (messages) "
    "was expected"
)


def need_file(path: Path) -> None:
    """Raise where there is no file to read."""
    if path.is_dir():
        raise DataError(
            f"{path}", rule="is a folder; expected one file of rows", next="name the file itself"
        )
    if not path.exists():
        raise DataError(f"{path}", rule="is not there", next="check the path")
    if not path.is_file():
        raise DataError(
            f"{path}",
            rule="is no ordinary file (a pipe?), and it is read more than once",
            next="write it to a file first",
        )


def rows(path: Path, expected: str = EXPECTED) -> Iterator[tuple[int, str, Any]]:
    """Line number (from 1), place in words, value: of an array's elements or of each line. expected:
    what the file should hold, for the error that says that it is empty."""
    need_file(path)
    window = _Window(_texts(path))
    window.skip(str.isspace)
    mark = window.mark()
    if not mark:
        raise DataError(f"{path} is empty", rule=expected, next="give another file")
    yield from _array(window, path) if mark == "[" else _lines(window, path)


class _Window:
    """A part of a text: from `at` on what is still to be read, as much of it as is needed."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.text, self.at, self.pieces = "", 0, pieces
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        """The number of the line that `at` is in."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def more(self) -> bool:
        """Let go of what is behind, and read on; whether there was anything."""
        piece = next(self.pieces, None)
        if piece is None:
            return False
        _ = self.line
        self.text = self.text[self.at :] + piece
        self.at = self._counted = 0
        return True

    def skip(self, what: Any = " \t\r\n".__contains__) -> None:
        """Go to the first character that is not of these."""
        while True:
            while self.at < len(self.text) and what(self.text[self.at]):
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return

    def mark(self) -> str:
        """The character here; "" at the end."""
        return self.text[self.at : self.at + 1]

    def next(self, count: int) -> str:
        """The characters from here on, so many where there are."""
        while len(self.text) - self.at < count and self.more():
            pass
        return self.text[self.at : self.at + count]


def _lines(window: _Window, path: Path) -> Iterator[tuple[int, str, Any]]:
    """From the first line that is not blank."""
    pieces = chain([window.text[window.at :]], window.pieces)
    for number, line in enumerate(_split(pieces), start=window.line):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _no_json(path, f"line {number}", line, error) from error
        yield number, f"line {number}", value


def _array(window: _Window, path: Path) -> Iterator[tuple[int, str, Any]]:
    window.at += 1
    window.skip()
    index, more = 0, window.mark() != "]"
    while more:
        line = window.line
        place = f"line {line} (row {index})"
        yield line, place, _value(window, path, place)
        window.skip()
        mark = window.mark()
        if mark not in (",", "]") or not mark:
            found = f"{mark!r} after row {index}" if mark else "the end of the file"
            raise DataError(
                f"{path}, line {window.line}: {found}",
                rule="where , or ] was expected, as in a JSON array of rows",
                next="the file may be cut short: fetch it again; nothing was changed",
            )
        index, more = index + 1, mark == ","
        if more:
            window.at += 1
            window.skip()
    window.at += 1
    window.skip(str.isspace)
    if window.mark():
        raise DataError(
            f"{path}, line {window.line}: {window.next(40).strip()!r}",
            rule="follows the array, where the end of the file was expected",
            next="one array a file; nothing was changed",
        )


def _value(window: _Window, path: Path, place: str) -> Any:
    """The JSON value that begins here; behind it then."""
    decode = json.JSONDecoder().raw_decode
    while True:
        try:
            value, end = decode(window.text, window.at)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "pos", 0)
            cut = at > len(window.text) - CUT or "Unterminated string" in str(error)
            if cut and window.more():
                continue
            raise _no_json(path, place, window.next(80), error) from error
        if end >= len(window.text) - 2 and window.more():  # a number may go on: 1, 1., 1e
            continue
        window.at = end
        return value


def _no_json(path: Path, place: str, text: str, error: Exception) -> DataError:
    why = getattr(error, "msg", "") or type(error).__name__
    return DataError(
        f"{path}, {place}: {text.strip()[:60]!r} is no JSON ({why})",
        rule="where a JSON array of rows, or one JSON object a line, was expected",
        next="mend or take out that row; nothing was changed",
    )


# ---------------------------------------------------------------------------------- bytes to text


def text(path: Path, expected: str) -> str:
    """The whole of a file that is a text."""
    need_file(path)
    found = "".join(_texts(path))
    if not found.strip():
        raise DataError(f"{path} is empty", rule=expected, next="give another file")
    return found


def lines(path: Path) -> Iterator[str]:
    """A file's lines with their ends, unpacked and decoded."""
    return _split(_texts(path))


def _split(pieces: Iterable[str]) -> Iterator[str]:
    """Lines end at "\n" alone."""
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            yield line + "\n"
    if rest:
        yield rest


def _texts(path: Path) -> Iterator[str]:
    """The file's characters: unpacked, decoded, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, wide, first = 1, False, True
    for piece in _bytes(path):
        if first:
            wide, first = piece[:2] in (b"\xff\xfe", b"\xfe\xff"), False
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            broken: bytes = error.object
            raise DataError(
                f"{path}, line {line + broken[: error.start].count(10)}: "
                f"byte 0x{broken[error.start]:02x}",
                rule="is not UTF-8; text must be UTF-8",
                next=f"iconv -f {'UTF-16' if wide else 'GB18030'} -t UTF-8 {path.name} > utf8.jsonl, "
                f"{'then' if wide else 'or whatever the encoding is, then'} give that file",
            ) from error
        line += text.count("\n")
        if text:
            yield text


def _bytes(path: Path) -> Iterator[bytes]:
    """The file in pieces, unpacked where it is gzip; an empty one is the end."""
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(0)
        pieces = iter(lambda: file.read(PIECE), b"")
        yield from _unpacked(pieces, path) if start == b"\x1f\x8b" else pieces
    yield b""


def _unpacked(pieces: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """All members of a gzip file; says how far it could be read where it breaks off."""
    member, line, fault = zlib.decompressobj(wbits=31), 1, ""
    rest = next(pieces)
    while rest and not fault:
        try:
            out = member.decompress(rest, PIECE)
        except zlib.error as error:
            out, fault = b"", f"is broken ({error})"
        line += out.count(10)
        if out:
            yield out
        if member.eof:
            rest = member.unused_data.lstrip(b"\0")
            while not rest and (piece := next(pieces, b"")):  # padding, however long
                rest = piece.lstrip(b"\0")
            if rest:
                member = zlib.decompressobj(wbits=31)
        else:
            rest = member.unconsumed_tail or next(pieces, b"")
            if not rest:
                fault = fault or "breaks off"
    if fault:
        raise DataError(
            f"{path}: the gzip stream {fault} in line {line} or behind it",
            rule="where a whole file was expected",
            next="fetch or pack the file again; nothing was changed",
        )
