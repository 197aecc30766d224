"""Hugging Face folders.

config.json, and model.safetensors or its shards with model.safetensors.index.json, or in older ones
pytorch_model.bin or pytorch_model-00001-of-00002.bin with pytorch_model.bin.index.json. Quantised
matrices may lie in them as compressed-tensors has them (compressed.py). Some models were published as
bare tensors, in one file and without a config.json (RWKV-4's .pth).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from herdbook.errors import FileError
from herdbook.files import pickles, safetensors
from herdbook.files.foreign import MEGABYTE, read_json
from herdbook.files.safetensors import Entry
from herdbook.model.checkpoint.base import Checkpoint, check_shapes, expected_shapes
from herdbook.model.checkpoint.compressed import KEY, CompressedWeights, schemes
from herdbook.model.checkpoint.weights import Part, PlainWeights
from herdbook.model.families import by_source, families
from herdbook.model.family import SourceTensor
from herdbook.model.sources import check_sizes, read_config, source_shapes

INDEX = "model.safetensors.index.json"
LEGACY_INDEX = "pytorch_model.bin.index.json"
LEGACY = "pytorch_model.bin"
#: a model of 100,000 tensors has an index of about 10 MB
INDEX_LIMIT_BYTES = 32 * MEGABYTE
#: what marks the weights of a delta, in the header of its files (see model/delta.py)
DELTA_MARK = "herdbook_delta"


def open_folder(folder: Path, *, delta: bool = False) -> Checkpoint:
    """Of a model in one file without a config.json, that file. delta: the weights are differences
    from another model's, and are to be."""
    where = folder / "config.json"
    if where.is_file():
        source = read_json(where)
        by_source(source, str(where))  # an unknown family is told before the weights are looked at
        plain = PlainWeights(_parts(folder, delta))
    else:
        plain = PlainWeights(_parts(folder, delta))
        if (found := sizes(folder, plain)) is None:
            raise no_model(folder)
        source = found
    weights: PlainWeights | CompressedWeights = plain
    if quantised := source.pop(KEY, None):
        weights = CompressedWeights(plain, schemes(quantised, str(where)), str(folder))
    return understand(folder, where, source, weights)


def understand(
    folder: Path, where: Path, source: dict[str, Any], weights: PlainWeights | CompressedWeights
) -> Checkpoint:
    """The model of this configuration, which stands at `where`, and of tensors under the names of its
    family."""
    family = by_source(source, str(where))
    config = read_config(family, source, str(where))
    found = dict(weights.shapes)
    check_sizes(folder, config, found)

    # a base model saved alone has no "model." (GPT-2: "transformer.") in front of its names
    front = family.names["embed"][0].partition(".")[0] + "."
    base = not any(name.startswith((front, f"language_model.{front}")) for name in found)
    head, embed = family.hf_name("head.weight"), family.hf_name("embed.weight")
    if family.ties_by_tensors and head in found and embed in found:
        config = dataclasses.replace(config, tied=weights.same(head, embed))
    headless = not config.tied and head not in found
    if "score.weight" in found:
        config = dataclasses.replace(config, labels=labels(source, found["score.weight"][0], where))
    expected = expected_shapes(config, headless=headless)
    names = {name: family.hf_tensor(name, config) for name in expected}
    if base:
        names = _renamed(names, lambda name: name.removeprefix(front))
    if family.layout is not None and family.layout(names["embed.weight"].name) in found:
        names = _renamed(names, family.layout)
    if "text_config" in source:  # a model with eyes: its language model alone is read
        names = _renamed(names, lambda name: f"language_model.{name}")
        found = {name: s for name, s in found.items() if name.startswith("language_model.")}
        ids = {key: value for key, value in source.items() if key.endswith("_token_id")}
        source = family.source(config) | ids
    embed = names["embed.weight"].name
    for copy in (*family.copies, *([head] if config.tied else [])):
        # saved although it is the embedding: it must be
        if found.pop(copy, None) and not (embed in found and weights.same(copy, embed)):
            raise FileError(
                f"{folder}: tensor {copy!r} differs from {embed!r}",
                rule="but the config says that they are tied (tie_word_embeddings)",
                next="set tie_word_embeddings to false in config.json if the head is its own",
            )
    check_shapes(folder, source_shapes(expected, names), weights, found)
    return Checkpoint(folder, family, config, source, headless, names, expected, weights)


def labels(source: dict[str, Any], count: int, where: Path) -> tuple[str, ...]:
    """A classifier's, in the order of its scores."""
    named = source.get("id2label") or {str(n): f"LABEL_{n}" for n in range(count)}
    if not isinstance(named, dict) or set(map(str, named)) != {str(n) for n in range(count)}:
        raise FileError(
            f"{where}: id2label is {str(named)[:200]}",
            rule=f"but score.weight has {count} rows",
            next="name a label for each of them, counted from 0",
        )
    return tuple(str({str(key): one for key, one in named.items()}[str(n)]) for n in range(count))


def _renamed(
    names: dict[str, SourceTensor], rename: Callable[[str], str]
) -> dict[str, SourceTensor]:
    return {
        ours: dataclasses.replace(source, name=rename(source.name))
        for ours, source in names.items()
    }


def sizes(folder: Path, weights: PlainWeights) -> dict[str, Any] | None:
    """The configuration of a model that came without, from its tensors' names and shapes."""
    if not weights.files:  # nor any tensors
        return None
    for family in families().values():
        if family.sizes and (source := family.sizes(weights.shapes, weights.files[0].stem)):
            return family.source(read_config(family, source, str(folder)))
    return None


def _parts(path: Path, delta: bool) -> dict[str, list[Part]]:
    """Each tensor's file and place, every header checked."""
    folder = path.parent if path.is_file() else path
    listed, shards = ({}, [path.name]) if path.is_file() else _shards(folder)
    parts: dict[str, list[Part]] = {}
    for shard in shards:
        for name, entry in _entries(folder / shard, delta).items():
            if name in parts:
                raise FileError(
                    f"{folder}: tensor {name!r} lies in {parts[name][0].path.name} and in {shard}",
                    rule="but each tensor has one file",
                    next=f"leave only the model's own shards in the folder, with their {INDEX}",
                )
            parts[name] = [Part(folder / shard, entry)]
    for name, shard in listed.items():
        if name not in parts or parts[name][0].path.name != shard:
            raise FileError(
                f"{folder}: its index puts tensor {name!r} into {shard}",
                rule="but it does not lie there",
                next="fetch the model again",
            )
    return parts


def _entries(path: Path, delta: bool) -> dict[str, Entry]:
    if path.suffix in (".bin", ".pth"):
        return pickles.read_table(path)
    header = safetensors.read_header(path)
    if not delta and DELTA_MARK in header.metadata:
        raise FileError(
            f"{path.parent}",
            rule="is a delta, the difference of a model from its base",
            next=f"herd delta apply BASE {path.parent} PATH",
        )
    return header.tensors


def _shards(folder: Path) -> tuple[dict[str, str], list[str]]:
    """What the index says (tensor → file; nothing without one), and the weight files."""
    for index, alone in ((INDEX, "model.safetensors"), (LEGACY_INDEX, LEGACY)):
        if (folder / index).is_file():
            listed = _weight_map(folder / index, Path(alone).suffix)
            return listed, sorted(set(listed.values()))
        if (folder / alone).is_file():
            return {}, [alone]
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    bare = [path.name for path in folder.glob("*.pth")]
    if not shards and len(bare) != 1:
        raise no_model(folder)
    return {}, shards or bare


def _weight_map(index: Path, suffix: str) -> dict[str, str]:
    listed = read_json(index, INDEX_LIMIT_BYTES).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise FileError(f"{index}", rule="has no weight_map", next="fetch it again")
    for name in listed.values():
        if not (isinstance(name, str) and re.fullmatch(rf"[\w.-]{{1,200}}\{suffix}", name)):
            raise FileError(
                f"{index} names the file {str(name)[:200]!r}",
                rule=f"but shards lie beside the index and end in {suffix}",
                next="fetch the model again from a source that you trust",
            )
    return listed


def no_model(folder: Path) -> FileError:
    return FileError(
        f"{folder}",
        rule="holds no model: no config.json with .safetensors or pytorch_model.bin, no params.json "
        "with consolidated.00.pth, no model.gguf, no .pth of an RWKV-4 alone",
        next="give the folder that holds config.json, or a .gguf or .pth file",
    )
