"""Who judges or answers: a model of ours, or one behind a URL."""

from __future__ import annotations

from herdbook.book.book import Book
from herdbook.data.teacher import Teacher
from herdbook.data.url_teacher import UrlTeacher
from herdbook.errors import ConfigError


def is_url(ref: str) -> bool:
    return ref.startswith(("http://", "https://"))


def opened(ref: str, name: str, book: Book, *, flag: str, name_flag: str) -> Teacher:
    """The teacher behind a reference to a model, or behind a URL whose server knows it by `name`.

    flag, name_flag: how the user gave the two, for the error.
    """
    if is_url(ref):
        need_name(ref, name, flag=flag, name_flag=name_flag)
        return UrlTeacher(ref, name)
    from herdbook.engine.loading import load
    from herdbook.model.references import resolve

    return load(str(resolve(ref, book)), book=book).as_teacher()


def need_name(ref: str, name: str, *, flag: str, name_flag: str) -> None:
    if not name:
        raise ConfigError(f"{flag} {ref}", rule="serves several models", next=f"{name_flag} NAME")
