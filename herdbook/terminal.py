"""What the commands of `herd` share. Heavy things are imported when they are called for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from herdbook.errors import FileError

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, Parameter(name="--json", negative="", help="print JSON for scripts")]


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))


def language() -> str:
    """The one of our two languages that the terminal speaks."""
    names = (os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "zh" if next(filter(None, names), "").lower().startswith("zh") else "en"


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def book() -> Any:
    from herdbook.book.book import Book

    return Book()


def need_own_page(path: Path) -> None:
    """Raise where another's file lies: only a page of ours may be written again."""
    if not os.path.lexists(path):
        return
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            if b"Herdbook</title>" in file.read(2000):
                return
    raise FileError(
        f"{path} is there already",
        rule="and is no page of Herdbook's, so it is not overwritten",
        next="give another --out",
    )
