"""The adapters that a model has beside it, by name; what one computes is in corrections.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from herdbook.errors import RequestError, nearest
from herdbook.model.interface import Model

if TYPE_CHECKING:
    from herdbook.book.book import Artifact
    from herdbook.engine.corrections import Adapter


class Adapters:
    """Those that a decoder has beside it, by name."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._loaded: dict[str, Adapter] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._loaded:
            raise RequestError(
                f"adapter {name!r}", rule="is not loaded", next=nearest(name, list(self._loaded))
            )
        return self._loaded[name]

    def load(self, name: str, adapter: Path | Artifact) -> None:
        """Put an adapter (peft's folder, or an artifact of the book) beside the base model.

        Requests that name it are computed with it; the others are not touched. Raises FileError where
        it is not for this base.
        """
        if name in self._loaded:
            raise RequestError(
                f"adapter {name!r}", rule="is loaded already", next="unload it, or use another name"
            )
        if self._model.memory != "pages":
            raise RequestError(
                f"an adapter for a {self._model.family} model",
                rule="cannot be chosen request by request: its layers do not see one row a token",
                next="load the adapter's own reference, or merge it (step Merge)",
            )
        from herdbook.engine.corrections import Adapter
        from herdbook.model.lora import adapters_of

        decoder = self._model.module()
        if adapters_of(decoder):
            raise RequestError(
                "an adapter for a model that carries one already",
                rule="would be added to that one",
                next="load the base model, and both adapters on it",
            )
        folder = adapter if isinstance(adapter, Path) else adapter.path
        self._loaded[name] = Adapter(decoder, folder)

    def unload(self, name: str) -> None:
        """Take it off; no request may use it."""
        self[name].remove()
        del self._loaded[name]
