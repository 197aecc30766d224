"""Small files from foreign hands: bounded in size; in JSON every name once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from herdbook.errors import FileError

MEGABYTE = 1_000_000


def read_json(path: Path, limit_bytes: int = 4 * MEGABYTE) -> dict[str, Any]:
    """A JSON object from a file of at most `limit_bytes`: parsed, JSON takes up to 25 times as much."""
    if not path.is_file():
        raise FileError(f"{path}", rule="is no file", next="check the path")
    try:
        value = parse_json(read_bytes(path, limit_bytes))
    except ValueError as error:
        raise FileError(f"{path}", rule=f"is no JSON: {error}", next="fetch it again") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}", rule="holds no JSON object", next="fetch it again")
    return value


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """A file of at most `limit_bytes`."""
    size = path.stat().st_size
    if size > limit_bytes:
        raise FileError(
            f"{path} has {size:,} bytes",
            rule=f"but no file of its kind has more than {limit_bytes:,}",
            next="fetch the model again from a source that you trust",
        )
    return path.read_bytes()


def parse_json(raw: bytes) -> Any:
    """What the bytes say. ValueError: they are no JSON, nested too deep, or name something twice."""
    try:
        return json.loads(raw, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:200]!r} comes twice")
            seen.add(name)
    return found
