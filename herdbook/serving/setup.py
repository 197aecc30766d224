"""What a server serves, and how: names, references and settings of its engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from herdbook.book.book import Book
from herdbook.engine.engine import Engine
from herdbook.engine.loading import CacheType, Device, adapter_folder, load
from herdbook.engine.memory import estimated_bytes
from herdbook.errors import ServeError
from herdbook.model.references import resolve
from herdbook.serving.models import Models
from herdbook.serving.worker import Worker


@dataclass(frozen=True)
class Setup:
    """What is served and how; the processes of a cluster are told it as JSON."""

    refs: list[str]
    template: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    idle_s: float | None = None
    cache: CacheType | None = None
    speculate: bool = False
    device: Device | None = None

    def models(self, book: Book | None) -> Models:
        """The models behind the references; an unknown name is told before anything is opened."""
        paths = [resolve(ref, book) for ref in self.refs]
        folders = {name: adapter_folder(ref, book) for name, ref in self.adapters.items()}
        counted = self.memory_bytes is not None
        workers = [
            Worker(
                served_name(ref),
                partial(self.engine, ref, book, folders),
                adapters=[*folders],
                estimate_bytes=estimated_bytes(path, self.cache, adapters=bool(folders))
                if counted
                else 0,
            )
            for ref, path in zip(self.refs, paths, strict=True)
        ]
        by_name = {worker.name: worker for worker in workers}
        return Models(by_name, memory_bytes=self.memory_bytes, idle_s=self.idle_s)

    def engine(self, ref: str, book: Book | None, adapters: Mapping[str, Path]) -> Engine:
        model = load(ref, book=book, template=self.template, device=self.device)
        engine = Engine(
            model.model,
            model.maybe_tokenizer,
            cache_dtype=self.cache,
            speculate="ngram" if self.speculate else None,
        )
        for name, folder in adapters.items():
            engine.load_adapter(name, folder)
        return engine


def named(adapters: Sequence[str]) -> dict[str, str]:
    """What --lora says: NAME=REF of each.

    >>> named(["luna=luna-tune@2"])
    {'luna': 'luna-tune@2'}
    """
    found: dict[str, str] = {}
    for one in adapters:
        name, _, ref = one.partition("=")
        if not name or not ref or name in found:
            raise ServeError(
                f"--lora {one}",
                rule="must be NAME=REF, each name once",
                next="for example --lora luna=./luna-adapter",
            )
        found[name] = ref
    return found


def served_name(ref: str) -> str:
    """What clients call the model by.

    >>> served_name("cria@2"), served_name("models/tiny.Q4_1.gguf"), served_name("hf:org/name")
    ('cria@2', 'tiny.Q4_1', 'org/name')
    """
    if ref.startswith("hf:"):
        return ref[3:]
    if "/" in ref or ref.endswith((".gguf", ".pth")) or ref in (".", ".."):
        return Path(ref).resolve().name.removesuffix(".gguf").removesuffix(".pth")
    return ref
