"""`herd keys`: add, list, revoke."""

from __future__ import annotations

import sys

from cyclopts import App

from herdbook.terminal import Json, book, console, print_json

app = App(
    name="keys",
    help="API keys for herd serve, each with its own limits.\n\nThe book keeps their hashes only. "
    "Once it has a key, the server wants one from everybody.\n\nExample: herd keys add alice",
)


@app.command
def add(
    name: str, /, *, requests: int | None = None, tokens: int | None = None, json: Json = False
) -> None:
    """Make a key. It is shown once, alone on stdout, and cannot be read again.

    Example: herd keys add alice --requests 60 --tokens 20000

    Parameters
    ----------
    name
        whose it is; it stands in the server's log
    requests
        most requests a minute (default: no limit)
    tokens
        most tokens a minute, prompts and replies together (default: no limit)
    """
    from herdbook.book.keys import Keys

    key = Keys(book()).add(name, requests_per_minute=requests, tokens_per_minute=tokens)
    if json:
        print_json({"name": name, "key": key})
        return
    print(key)
    print("keep it: it cannot be shown again", file=sys.stderr)


@app.command(name="list")
def list_command(*, json: Json = False) -> None:
    """List the keys: names, limits, when they were made and revoked.

    Example: herd keys list
    """
    from herdbook.book.keys import Keys

    keys = Keys(book()).all()
    if json:
        print_json([key.to_mapping() for key in keys])
        return
    from rich.table import Table

    table = Table("name", "requests/min", "tokens/min", "made", "revoked", box=None)
    for key in keys:
        limits = (key.requests_per_minute, key.tokens_per_minute)
        shown = ("–" if limit is None else f"{limit:,}" for limit in limits)
        table.add_row(key.name, *shown, key.created[:19], (key.revoked or "")[:19])
    console().print(table if keys else "There are no keys. Make one: herd keys add NAME")


@app.command
def revoke(name: str, /) -> None:
    """End a key: running servers refuse it within seconds.

    Example: herd keys revoke alice

    Parameters
    ----------
    name
        as in herd keys list
    """
    from herdbook.book.keys import Keys

    Keys(book()).revoke(name)
    print(f"{name} is revoked")
