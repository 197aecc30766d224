"""What a model holds in memory: counted once it is loaded, estimated from its files before.

Both count the weights in every form in which they are kept (blocks of 4 bits also as the kernels
want them) and the whole cache of keys and values, which fills up with use. Neither counts the
interpreter, its libraries and the working memory of a step.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from herdbook.engine.cache import cache_pages, token_bytes
from herdbook.engine.engine import Engine
from herdbook.model.checkpoint import open_checkpoint
from herdbook.model.checkpoint.weights import GGUFWeights
from herdbook.model.modules import build
from herdbook.model.precision import compute_dtype
from herdbook.training import peft_format

PAGE_TOKENS = 16  # Engine's own
#: bytes a block of 32 values: as our layer keeps it (model/layers.py) and once more as the native step
#: (engine/native.py) wants it
BLOCK_BYTES = {"Q4_0": 20 + 20, "Q4_1": 20 + 20, "Q8_0": 36 + 36}


def held_bytes(engine: Engine) -> int:
    """Of an engine's decoder and cache."""
    decoder = engine.decoder
    tensors = [tensor for module in decoder.modules() for tensor in _tensors(module)]
    tensors += engine.runner.copies
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    weights = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    if decoder.memory != "pages":
        return weights
    return weights + engine.pool.tokens * token_bytes(decoder.config, engine.runner.cache.dtype)


def _tensors(module: nn.Module) -> list[Tensor]:
    """A module's own tensors, plain attributes included."""
    kept = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return kept + [value for value in vars(module).values() if isinstance(value, Tensor)]


def estimated_bytes(path: Path, cache_dtype: torch.dtype | None = None) -> int:
    """Of the model at `path`, from its headers; 0 for an adapter, whose base is not looked up."""
    if (path / peft_format.CONFIG).is_file():
        return 0
    checkpoint, dtype = open_checkpoint(path), compute_dtype()
    config, weights = checkpoint.config, checkpoint.weights
    with torch.device("meta"):
        paged = build(config, headless=checkpoint.headless).memory == "pages"
    kept = cache_dtype or dtype
    tokens = cache_pages(config, kept, PAGE_TOKENS, None) * PAGE_TOKENS if paged else 0
    total, blocks = tokens * token_bytes(config, kept), False
    for name, shape in checkpoint.shapes.items():
        kind = ""
        if isinstance(weights, GGUFWeights):
            kind = weights.file.tensors[checkpoint.names[name].name].type
        blocks |= kind in BLOCK_BYTES
        values = math.prod(shape)
        if name == "embed.weight":  # rows are taken singly: in 8 bits or dense, and no second time
            total += int(values * (36 / 32 if kind == "Q8_0" else dtype.itemsize))
            continue
        each = BLOCK_BYTES[kind] / 32 if kind in BLOCK_BYTES else dtype.itemsize
        total += int(values * each)
    if blocks and config.tied:  # the native step keeps a head in 8 bits
        total += config.vocab * config.hidden * 36 // 32
    return total
