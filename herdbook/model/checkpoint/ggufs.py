"""GGUF files as checkpoints."""

from __future__ import annotations

from pathlib import Path

from herdbook.files import gguf
from herdbook.model.checkpoint.base import Checkpoint, check_shapes, expected_shapes
from herdbook.model.checkpoint.weights import GGUFWeights
from herdbook.model.gguf_config import read
from herdbook.model.sources import source_shapes


def open_gguf(path: Path) -> Checkpoint:
    file = gguf.read(path)
    weights = GGUFWeights(file)
    family, config, source = read(file, weights.shapes)
    ids = {key: value for key, value in source.items() if key.endswith("_token_id")}
    expected = expected_shapes(config)
    names = {name: family.gguf_tensor(name, config) for name in expected}
    check_shapes(path, source_shapes(expected, names), weights, weights.shapes)
    source = family.source(config) | ids
    return Checkpoint(path, family, config, source, False, names, expected, weights)
