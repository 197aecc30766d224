"""The step that brings a tokenizer from outside into the book."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.hashing import digest
from herdbook.book.step import Bench, Step, require
from herdbook.errors import FileError
from herdbook.files.atomic import sha256_once
from herdbook.tokens import reading, settings
from herdbook.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class FetchTokenizer(Step):
    """Bring a tokenizer into the book: a .model, tokenizer.json, .tiktoken, .gguf or a folder."""

    kind: ClassVar[str] = "tokenizer"
    path: str = ""

    def called(self) -> str | None:
        """folder/Chinese SP.model → chinese-sp"""
        own = Path(self.path).absolute()
        stem = own.name if own.is_dir() else own.stem
        return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._") or None

    def check(self) -> None:
        require(self, "path")
        if not Path(self.path).exists():
            raise FileError(f"{self.path}", rule="is not there", next="check the path")

    def fingerprint(self) -> dict[str, str]:
        """The files that are read, and the chat template: it may be one that only the name tells."""
        path = Path(self.path)
        file = reading.find(path) if path.is_dir() else path
        found = set() if file is None else {file}
        if path.is_dir():
            found.add(path / "tokenizer.model")
        if file is not None and file.suffix != ".gguf":
            found |= {file.parent / name for name in (*settings.FILES, "merges.txt")}
        hashes = {one.name: sha256_once(one) for one in sorted(found) if one.is_file()}
        template = reading.template(path)
        return hashes | ({} if template is None else {"chat template": digest(template)})

    def make(self, bench: Bench) -> dict[str, Any]:
        path = Path(self.path)
        tokenizer = Tokenizer.load(path)
        tokenizer.save(bench.out)
        return {
            "vocabulary": tokenizer.size,
            "kind": type(tokenizer.codec).__name__.removesuffix("Codec").lower(),
        }
