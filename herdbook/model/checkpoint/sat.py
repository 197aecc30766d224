"""SwissArmyTransformer's layout, in which GLM-130B was published: one file a machine of the cluster.

    folder/latest                                  the name of the folder below: 49300
    folder/49300/mp_rank_00_model_states.pt …      a dictionary with the tensors under "module"

Each machine holds a part of every matrix: rows of the embedding, of query_key_value and dense_h_to_4h
(and of their biases), columns of those that go second (attention.dense, dense_4h_to_h). The norms and
the biases of the second ones are whole in each. Of a gated dense_h_to_4h each part is again [up; gate].
No file holds the configuration: a config.json beside them is read, else the tensors tell it.

Source: https://github.com/THUDM/GLM-130B (tools/convert_tp.py)
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

from herdbook.errors import FileError
from herdbook.files.foreign import read_json
from herdbook.files.pickles import read_table
from herdbook.files.safetensors import WIDTHS, Entry
from herdbook.model.checkpoint.base import Checkpoint
from herdbook.model.checkpoint.huggingface import sizes, understand
from herdbook.model.checkpoint.weights import Part, PlainWeights

LATEST = "latest"
SHARDS = "mp_rank_*_model_states.pt"
ROWS = re.compile(r".*\.(word_embeddings\.weight|(query_key_value|dense_h_to_4h)\.(weight|bias))")
COLUMNS = re.compile(r".*\.(attention\.dense|mlp\.dense_4h_to_h)\.weight")
GATED = re.compile(r".*\.dense_h_to_4h\.(weight|bias)")


def sat_folder(folder: Path) -> Path | None:
    """The folder of the shards: this one, or the one that its file `latest` names."""
    if any(folder.glob(SHARDS)):
        return folder
    latest = folder / LATEST
    if not latest.is_file() or latest.stat().st_size > 100:
        return None
    name = latest.read_text("utf-8", "replace").strip()
    inner = folder / name
    return inner if re.fullmatch(r"\w+", name) and any(inner.glob(SHARDS)) else None


def open_sat(folder: Path) -> Checkpoint:
    shards = sorted(folder.glob(SHARDS))
    wanted = [f"mp_rank_{rank:02}_model_states.pt" for rank in range(len(shards))]
    if [shard.name for shard in shards] != wanted:
        missing = next(name for name in wanted if not (folder / name).is_file())
        raise FileError(
            f"{folder}: {missing} is missing",
            rule=f"but there are {len(shards)} files of that kind, numbered from 00",
            next="fetch the files again, all of one model",
        )
    tables = [read_table(shard, within="module") for shard in shards]
    parts: dict[str, list[Part]] = {}
    axes: dict[str, int] = {}
    for shard, table in zip(shards, tables, strict=True):
        if table.keys() != tables[0].keys():
            raise FileError(
                f"{shard} holds other tensors than {shards[0].name}",
                rule="but each file holds a part of every tensor",
                next="fetch the files again, all of one model",
            )
    for name, first in tables[0].items():
        entries = [table[name] for table in tables]
        if any((one.shape, one.dtype) != (first.shape, first.dtype) for one in entries):
            raise FileError(
                f"{folder}: tensor {name!r} has not the same shape and type in all files",
                rule="so its parts cannot be put together: the machines have equal ones",
                next="fetch the files again, all of one model",
            )
        parts[name] = [Part(path, one) for path, one in zip(shards, entries, strict=True)]
        if ROWS.fullmatch(name) and first.shape:
            axes[name] = 0
        elif COLUMNS.fullmatch(name) and len(first.shape) == 2:
            axes[name] = 1
        if GATED.fullmatch(name) and first.shape:
            parts[name] = _halves(folder, name, parts[name])
    weights = PlainWeights(parts, axes)
    where = folder / "config.json"
    source = read_json(where) if where.is_file() else sizes(folder, weights)
    if source is None:
        raise FileError(
            f"{folder}: the tensors do not tell the model's sizes",
            rule="and there is no config.json",
            next=f"write {where} with SAT's arguments: model_type glm-130b, num_layers, hidden_size, "
            "inner_hidden_size, num_attention_heads, vocab_size",
        )
    checkpoint = understand(folder, where, source, weights)
    if checkpoint.config.heads % len(shards):
        raise FileError(
            f"{folder}: {len(shards)} files for {checkpoint.config.heads} heads",
            rule="cannot be put together: each machine has as many whole heads",
            next="fetch the files again, all of one model; check num_attention_heads in config.json",
        )
    return checkpoint


def _halves(folder: Path, name: str, parts: list[Part]) -> list[Part]:
    """Every machine's first half of the rows, then every machine's second."""
    entry = parts[0].entry
    if entry.shape[0] % 2:
        raise FileError(
            f"{folder}: tensor {name!r} has {entry.shape[0]} rows in each file",
            rule="so its parts cannot be put together: half of them are gates",
            next="fetch the files again, all of one model",
        )
    return [Part(part.path, _half(part.entry, half)) for half in (0, 1) for part in parts]


def _half(entry: Entry, half: int) -> Entry:
    rows = entry.shape[0] // 2
    step = entry.strides[0] if entry.strides else math.prod(entry.shape[1:])
    start = entry.start + half * rows * step * WIDTHS[entry.dtype]
    shape = (rows, *entry.shape[1:])
    return dataclasses.replace(entry, shape=shape, start=start, nbytes=entry.nbytes // 2)
