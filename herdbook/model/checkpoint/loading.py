"""A checkpoint becomes a decoder, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from herdbook.errors import FamilyError
from herdbook.model.at_once import Step, at_once
from herdbook.model.checkpoint.base import Checkpoint
from herdbook.model.checkpoint.opening import open_checkpoint
from herdbook.model.decoder import Decoder
from herdbook.model.layers import Int4Linear, Int8Embedding, Int8Linear, Linear
from herdbook.model.modules import build
from herdbook.model.nf4 import NF4Linear
from herdbook.model.precision import compute_dtype
from herdbook.model.streamed import Streamed


def load_decoder(
    path: Path | str,
    dtype: torch.dtype | None = None,
    quantised: bool = False,
    nf4: bool = False,
    streamed: bool = False,
) -> Decoder:
    """The decoder at `path`, frozen (no gradients), in `dtype` (default: what the machine computes).

    quantised: matrices that a GGUF keeps as Q4_0, Q4_1 or Q8_0, or a folder as compressed-tensors,
    stay so; the rest is in `dtype`. nf4: instead, the blocks' matrices are rounded to NF4 one by one
    as they are read. streamed: the blocks' matrices are read whenever a block computes (see streamed.py),
    in `dtype` whatever the source's is.
    """
    checkpoint = open_checkpoint(path)
    dtype = dtype or compute_dtype()
    with torch.device("meta"):
        decoder = build(checkpoint.config, headless=checkpoint.headless)
    decoder.family = checkpoint.family.name
    decoder.source_config = dict(checkpoint.source_config)
    if streamed:
        if type(decoder) is not Decoder:
            raise FamilyError(
                f"{path} is of the family {decoder.family}",
                rule="whose blocks are more than a decoder's, and are not streamed",
                next="leave offload out",
            )
        decoder.streamed = Streamed(decoder, checkpoint, dtype)
    # first all places: what is held besides them then leaves no holes
    fills: list[Iterable[Step]] = []
    for name, shape in checkpoint.shapes.items():
        module_name, _, leaf = name.rpartition(".")
        module = decoder.get_submodule(module_name)
        may = quantised and leaf == "weight"
        may = may and (isinstance(module, Linear) or module is decoder.embed)
        may = may and not name.endswith(".router.weight")  # which is multiplied in float32
        rounds = nf4 and isinstance(module, Linear) and name.startswith("blocks.")
        if rounds and leaf == "weight" and not name.endswith(".router.weight"):
            weight = checkpoint.read(name, torch.float32)
            _replace(decoder, module_name, NF4Linear(weight, _bias(checkpoint, name, dtype), dtype))
        elif may and (made := _quantised(checkpoint, name, dtype)):
            _replace(decoder, module_name, made[0])
            fills.append(made[1])
        elif decoder.streamed and (later := decoder.streamed.put(name, shape)) is not None:
            setattr(module, leaf, later)
        elif leaf in dict(module.named_parameters(recurse=False)):
            place = torch.empty(shape, dtype=dtype)
            setattr(module, leaf, nn.Parameter(place, requires_grad=False))
            fills.append(checkpoint.steps(name, place))
    at_once(chain.from_iterable(fills))
    return decoder.eval()


def _quantised(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype
) -> tuple[nn.Module, Iterable[Step]] | None:
    """The layer that keeps this weight's blocks, and what fills it; None where it has none that a
    layer can keep."""
    blocks = checkpoint.blocks(name)
    if blocks is None:
        return None
    found, steps = blocks
    if name == "embed.weight":  # rows are taken singly
        whole = found.minimum is None
        return (Int8Embedding(found.codes, found.scale, None, dtype), steps) if whole else None
    bias = _bias(checkpoint, name, dtype)
    if found.minimum is None:
        return Int8Linear(found.codes, found.scale, bias, dtype), steps
    return Int4Linear(found.codes, found.scale, found.minimum, bias, dtype), steps


def _bias(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor | None:
    bias = name.removesuffix("weight") + "bias"
    return checkpoint.read(bias, dtype) if bias in checkpoint.names else None


def _replace(decoder: Decoder, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(parent), leaf, module)
