"""GGUF files: llama.cpp's metadata and tensors, as a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

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
)
from herdbook.model.checkpoint.weights import GGUFWeights
from herdbook.model.config import DecoderConfig
from herdbook.model.families import by_gguf
from herdbook.model.family import llama3_from_divisors, source_from_gguf


def open_gguf(path: Path) -> Checkpoint:
    file = gguf.read(path)
    where = str(path)
    family = by_gguf(file.metadata.get("general.architecture"), file.metadata, where)
    embed = file.tensors.get(family.gguf_name("embed.weight"))
    if embed is None or len(embed.shape) != 2:
        raise FileError(
            f"{path}: tensor {family.gguf_name('embed.weight')!r} is missing",
            rule="so it is no language model (a vocabulary or an adapter alone?)",
            next="use the model's own .gguf file",
        )

    def has(name: str) -> bool:
        return family.gguf_name(name) in file.tensors

    try:
        source = source_from_gguf(file.metadata, family, embed.shape[0], has, where)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise FamilyError(
            f"{path}: {error}",
            rule=f"so a key of its metadata is not what a {family.gguf} model has there",
            next="fetch the file again, or convert it anew",
        ) from error
    config = read_config(family, source, where)
    weights = GGUFWeights(file)
    check_sizes(path, config, weights.shapes)
    if "rope_freqs.weight" in file.tensors:
        config = _scaled(config, file)
    ids = {key: value for key, value in source.items() if key.endswith("_token_id")}
    expected = expected_shapes(config)
    names = {name: family.gguf_name(name) for name in expected}
    check_shapes(path, expected, names, weights, weights.shapes)
    source = family.source(config) | ids
    return Checkpoint(
        path,
        family,
        config,
        source,
        False,
        names,
        expected,
        weights,
        interleaved=family.gguf_permuted,
    )


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
