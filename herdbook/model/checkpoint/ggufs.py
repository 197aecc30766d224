"""GGUF files: llama.cpp's metadata and tensors, as a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from herdbook.errors import FamilyError, FileError
from herdbook.files import gguf
from herdbook.model.checkpoint.base import (
    Checkpoint,
    check_shapes,
    check_sizes,
    expected_shapes,
    read_config,
    source_shapes,
)
from herdbook.model.checkpoint.weights import GGUFWeights
from herdbook.model.config import DecoderConfig
from herdbook.model.families import by_gguf
from herdbook.model.family import Family, llama3_from_divisors, source_from_gguf


def understand(
    metadata: dict[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str
) -> tuple[Family, DecoderConfig, dict[str, Any]]:
    """What a GGUF's metadata and its tensors' names and shapes say; the last under Hugging Face's
    keys."""
    family = by_gguf(metadata.get("general.architecture"), metadata, tensors, where)
    embed = tensors.get(family.gguf_name("embed.weight"), ())
    if len(embed) != 2:
        raise FileError(
            f"{where}: tensor {family.gguf_name('embed.weight')!r} is missing",
            rule="so it is no language model (a vocabulary or an adapter alone?)",
            next="use the model's own .gguf file",
        )

    def has(name: str) -> bool:
        return family.knows(name) and family.gguf_name(name) in tensors

    try:
        source = source_from_gguf(metadata, family, embed[0], has, where)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise FamilyError(
            f"{where}: {error}",
            rule=f"so a key of its metadata is not what a {family.gguf} model has there",
            next="fetch the file again, or convert it anew",
        ) from error
    return family, read_config(family, source, where), source


def open_gguf(path: Path) -> Checkpoint:
    file = gguf.read(path)
    weights = GGUFWeights(file)
    family, config, source = understand(file.metadata, weights.shapes, str(path))
    check_sizes(path, config, weights.shapes)
    if "rope_freqs.weight" in file.tensors:
        config = _scaled(config, file)
    ids = {key: value for key, value in source.items() if key.endswith("_token_id")}
    expected = expected_shapes(config)
    names = {name: family.gguf_tensor(name, config) for name in expected}
    check_shapes(path, source_shapes(expected, names), weights, weights.shapes)
    source = family.source(config) | ids
    return Checkpoint(path, family, config, source, False, names, expected, weights)


def _scaled(config: DecoderConfig, file: gguf.GGUF) -> DecoderConfig:
    """With LLaMA 3's rotary scaling, which GGUF keeps as a tensor."""
    name = "rope_freqs.weight"
    scaling, plain = None, False
    if math.prod(file.tensors[name].shape) == config.head_dim // 2:
        divisors = torch.from_numpy(file.array(name).astype(np.float32)).flatten()
        plain = torch.equal(divisors, torch.ones_like(divisors))
        if torch.isfinite(divisors).all():
            scaling = llama3_from_divisors(divisors, config)
    if scaling is None and not plain:
        raise FamilyError(
            f"{file.path}: rope_freqs.weight",
            rule="holds a rotary scaling that is not LLaMA 3's",
            next="use the model's safetensors, whose config names its scaling",
        )
    return dataclasses.replace(config, rope_scaling=scaling)
