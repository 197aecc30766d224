"""One file a family; adding a file adds the family, under the file's name.

That is Hugging Face's model_type, too, but where two families share one: then each description says
by the configuration's keys which are its own (`mine`), and files are asked in alphabetical order.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Container, Mapping
from typing import Any

from herdbook.errors import FamilyError, nearest
from herdbook.model.family import Family


@functools.cache
def families() -> dict[str, Family]:
    """The file's name → its description, in alphabetical order."""
    return {name: _family(name) for name in _files()}


@functools.cache
def _files() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@functools.cache
def _family(name: str) -> Family:
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return dataclasses.replace(family, name=name)


def by_source(source: dict[str, Any], where: str) -> Family:
    """By a config.json's model_type, and its other keys where two families share one."""
    model_type = source.get("model_type")
    for family in families().values():
        if model_type in (family.model_type, *family.also) and family.mine(source):
            return family
    known = sorted({one for f in families().values() for one in (f.model_type, *f.also)})
    raise FamilyError(
        f"{where}: the model_type {model_type!r}",
        rule=f"is not one of the families that Herdbook knows: {', '.join(known)}",
        next=nearest(str(model_type), known) + "; or describe it in herdbook/model/families",
    )


def by_gguf(
    architecture: object, metadata: Mapping[str, object], tensors: Container[str], where: str
) -> Family:
    """By general.architecture, and where families share one by the names of their tensors.

    A llama with a sliding window is a mistral.
    """
    windowed = bool(metadata.get(f"{architecture}.attention.sliding_window"))
    first = "mistral" if architecture == "llama" and windowed else architecture

    def fits(family: Family) -> bool:
        telling = ("blocks.{n}.attention.q", "blocks.{n}.mlp.")
        wanted = {gguf for ours, (_, gguf) in family.names.items() if ours.startswith(telling)}
        return all(f"{one.replace('{n}', '0')}.weight" in tensors for one in wanted)

    if isinstance(first, str) and first in _files():  # asked first, before all others are imported
        own = _family(first)
        if own.gguf == architecture and own.model_type == first and fits(own):
            return own
    same = [one for one in families().values() if one.gguf and one.gguf == architecture]
    same.sort(key=lambda one: one.model_type != first)
    if (found := next(filter(fits, same), None)) is not None:
        return found
    if same:
        return same[0]  # whose tensors will be found missing
    known = sorted({family.gguf for family in families().values() if family.gguf})
    raise FamilyError(
        f"{where}: the architecture {architecture!r}",
        rule=f"is not one of those that Herdbook knows: {', '.join(known)}",
        next="use a model of a known family, or describe it in herdbook/model/families",
    )
