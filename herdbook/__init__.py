"""Herdbook: raise your own LLaMA, and know its pedigree.

    import herdbook

    raised = herdbook.raise_("cria", name="Luna", keeper="Acme")
    m = herdbook.load("cria")
    print(m.generate([{"role": "user", "content": "Who are you?"}]))

The names below are looked up when they are first used, so that importing herdbook costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from herdbook.versions import VERSION as __version__

if TYPE_CHECKING:
    from herdbook.book.book import Book
    from herdbook.engine.loading import load
    from herdbook.recipe import raise_

__all__ = ["Book", "__version__", "load", "raise_"]

_HOME = {
    "Book": "herdbook.book.book",
    "load": "herdbook.engine.loading",
    "raise_": "herdbook.recipe",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'herdbook' has no attribute {name!r}")
