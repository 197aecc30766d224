"""One file a family, named by Hugging Face's model_type; adding a file adds the family."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from herdbook.errors import FamilyError, nearest
from herdbook.model.family import Family


@functools.cache
def families() -> dict[str, Family]:
    """model_type → description, in the files' alphabetical order."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = (importlib.import_module(f"{__name__}.{name}").FAMILY for name in modules)
    return {family.model_type: family for family in found}


def by_model_type(model_type: object, where: str) -> Family:
    known = families()
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    raise FamilyError(
        f"{where}: the model_type {model_type!r}",
        rule=f"is not one of the families that Herdbook knows: {', '.join(known)}",
        next=nearest(str(model_type), list(known)) + "; or describe it in herdbook/model/families",
    )


def by_gguf(architecture: object, metadata: dict[str, object], where: str) -> Family:
    """By general.architecture; a llama with a sliding window is a mistral."""
    windowed = bool(metadata.get(f"{architecture}.attention.sliding_window"))
    if architecture == "llama" and windowed:
        return families()["mistral"]
    for family in families().values():
        if family.gguf and family.gguf == architecture:
            return family
    known = sorted({family.gguf for family in families().values() if family.gguf})
    raise FamilyError(
        f"{where}: the architecture {architecture!r}",
        rule=f"is not one of those that Herdbook knows: {', '.join(known)}",
        next="use a model of a known family, or describe it in herdbook/model/families",
    )
