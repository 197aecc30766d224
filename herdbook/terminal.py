"""What the commands of `herd` share. Heavy things are imported when they are called for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, Parameter(name="--json", negative="", help="print JSON for scripts")]


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def book() -> Any:
    from herdbook.book.book import Book

    return Book()
