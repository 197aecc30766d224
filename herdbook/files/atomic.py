"""Files that are there whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well it takes `path`'s place, synced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`; when the block ends well it becomes `path`, synced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        os.rename(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """UTF-8, newlines as they are."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Readable, stable JSON: sorted keys would hide the author's order, so order is kept."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (renames, new names) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below `folder` durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sha256_file(path: Path) -> str:
    """«sha256:9f86d0…» of the file's bytes."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """The same, read once a process for as long as size and time of the file stay: for the keys of
    steps, which are asked for more often than a large checkpoint should be read."""
    seen = path.stat()
    return _sha256_at(path.resolve(), seen.st_size, seen.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256_at(path: Path, size: int, time_ns: int) -> str:
    return sha256_file(path)
