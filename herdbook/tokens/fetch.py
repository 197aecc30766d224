"""The step that brings a tokenizer from outside into the book."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.step import Bench, Step, require
from herdbook.errors import FileError
from herdbook.files.atomic import sha256_once
from herdbook.tokens import reading
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
        path = Path(self.path)
        if path.is_dir():
            found = {path / "tokenizer.model", *path.glob("*.json"), *path.glob("*.jinja")}
            found |= {one for one in [reading.find(path)] if one is not None}
        else:
            found = {path}
        return {one.name: sha256_once(one) for one in sorted(found) if one.is_file()}

    def make(self, bench: Bench) -> dict[str, Any]:
        path = Path(self.path)
        tokenizer = Tokenizer.load(path)
        tokenizer.save(bench.out)
        beside, copy = path / "tokenizer.model", bench.out / "tokenizer.model"
        if beside.is_file() and not copy.exists():  # beside a tokenizer.json: for extending
            shutil.copyfile(beside, copy)
        return {
            "vocabulary": tokenizer.size,
            "kind": type(tokenizer.codec).__name__.removesuffix("Codec").lower(),
        }
