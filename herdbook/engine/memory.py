"""What a model holds in memory: counted once it is loaded, estimated from its files before.

Both count the weights in every form in which they are kept (blocks of 4 bits also as the kernels
want them) and the whole cache of keys and values, which fills up with use. Neither counts the
interpreter, its libraries and the working memory of a step.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from herdbook.engine.engine import Engine
from herdbook.engine.packaged import Packaged, packaged
from herdbook.engine.pages import PAGE_TOKENS
from herdbook.engine.store import cache_kind, cache_pages, token_bytes
from herdbook.model.references import ADAPTER

if TYPE_CHECKING:
    from torch import Tensor, nn

#: bytes a block of 32 values: as our layer keeps it (model/layers.py) and once more as the native step
#: (engine/native.py) wants it
BLOCK_BYTES = {"Q4_0": 20 + 20, "Q4_1": 20 + 20, "Q8_0": 36 + 36}


def held_bytes(engine: Engine) -> int:
    """Of an engine's model and cache."""
    model, runner = engine.model, engine.runner
    weights = runner.native_bytes
    if isinstance(model, Packaged):
        weights += model.held_bytes
    if not isinstance(model, Packaged) or model.opened:
        weights += _module_bytes(model.module())
    if model.memory != "pages":
        return weights
    return weights + engine.pool.tokens * token_bytes(model.config, runner.kind)


def _module_bytes(module: nn.Module) -> int:
    """Of all its tensors, plain attributes included; what two of them share counts once."""
    tensors = [tensor for one in module.modules() for tensor in _tensors(one)]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    """A module's own tensors, plain attributes included."""
    from torch import Tensor

    kept = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return kept + [value for value in vars(module).values() if isinstance(value, Tensor)]


def estimated_bytes(path: Path, cache_dtype: str | None = None, *, adapters: bool = False) -> int:
    """Of the model at `path`, from its headers; 0 for an adapter, whose base is not looked up.

    adapters: some will stand beside it, so PyTorch has the weights as well.
    """
    if (path / ADAPTER).is_file():
        return 0
    if not adapters and (model := packaged(path)) is not None:
        kept = cache_dtype or cache_kind(model, None)
        tokens = cache_pages(model.config, kept, PAGE_TOKENS, None) * PAGE_TOKENS
        return model.weight_bytes + tokens * token_bytes(model.config, kept)
    import torch

    from herdbook.model.checkpoint import open_checkpoint
    from herdbook.model.checkpoint.weights import GGUFWeights
    from herdbook.model.modules import build
    from herdbook.model.precision import compute_dtype

    checkpoint, dtype = open_checkpoint(path), compute_dtype()
    config, weights = checkpoint.config, checkpoint.weights
    with torch.device("meta"):
        paged = build(config, headless=checkpoint.headless).memory == "pages"
    kept = cache_dtype or str(dtype).removeprefix("torch.")
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
