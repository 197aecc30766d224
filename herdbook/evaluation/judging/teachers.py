"""Who judges or answers: a model of ours, or one behind a URL."""

from __future__ import annotations

from typing import Any

from herdbook.book.book import Book
from herdbook.data.teacher import Teacher
from herdbook.data.url_teacher import UrlTeacher
from herdbook.engine.loading import load
from herdbook.errors import ConfigError
from herdbook.model.references import resolve


def is_url(ref: str) -> bool:
    return ref.startswith(("http://", "https://"))


def opened(ref: str, name: str = "", *, book: Book) -> Teacher:
    """The teacher behind a reference to a model, or behind a URL whose server knows it by `name`."""
    if is_url(ref):
        return UrlTeacher(ref, name)
    return load(ref, book=book).as_teacher()


def identity(ref: str, name: str, book: Book) -> Any:
    """What tells a teacher from others, without opening it: URL and name, an id in the book, or path, sizes
    and times of its files. Errors: as `resolve`; ConfigError for a URL without a name."""
    if is_url(ref):
        need_name(ref, name, "--by-model NAME (only a judge is asked by URL)")
        return [ref, name]
    if not ref:
        return None
    if (artifact := book.find(ref)) is not None:
        return artifact.id
    path = resolve(ref, book)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    seen = [(str(one), one.stat()) for one in files]
    return [(one, stat.st_size, stat.st_mtime_ns) for one, stat in seen]


def need_name(url: str, name: str, next_: str) -> None:
    """Raise for a URL alone."""
    if not name:
        raise ConfigError(url, rule="may serve several models", next=f"say which: {next_}")
