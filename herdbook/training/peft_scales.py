"""PEQA's scales in an adapter's folder. peft has no such adapter: the layout is ours, in its manner.

    base_model.model.<module>.weight_scale     [O, B]   of each block of 32 inputs
    base_model.model.<module>.weight_minimum   [O, B]   where the file keeps minima apart (GGUF)

What is there is what the tuned layer computes with, number for number; codes are the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.model.decoder import Decoder
from herdbook.model.layers import BLOCK, Int4Linear
from herdbook.model.peqa import FewBits, PEQALinear, rescaled, scale_of
from herdbook.training.peft_matrices import PREFIX, Reader, Tensors, joined, sources

SCALE, MINIMUM = "weight_scale", "weight_minimum"


@dataclass(frozen=True)
class Scales:
    """Of one of our matrices, [O, B] each."""

    scale: Tensor
    minimum: Tensor | None

    def on(self, layer: FewBits) -> FewBits:
        """The layer with these scales."""
        minimum = self.minimum
        if isinstance(layer, Int4Linear) and minimum is None:
            zero = -layer.minimum.float() / torch.where(layer.scale == 0, 1.0, layer.scale.float())
            minimum = -zero.round() * self.scale.float()
        return rescaled(layer, self.scale, minimum)


def write_scales(
    decoder: Decoder, adapters: Mapping[str, PEQALinear]
) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and settings."""
    tensors: Tensors = {}
    taken = {one.name: one for name, one in sources(decoder).items() if name in adapters}
    for source in taken.values():
        layers = [decoder.get_submodule(name) for name in source.ours]
        now = [one.tuned() if isinstance(one, PEQALinear) else one for one in layers]
        few = [one for one in now if isinstance(one, FewBits)]
        assert len(few) == len(now), "a packed matrix is in few bits as a whole"
        scales = [scale_of(one) for one in few]
        tensors[f"{PREFIX}{source.name}.{SCALE}"] = _narrow(joined(decoder, source, scales))
        if any(isinstance(one, PEQALinear) and one.minima for one in layers):
            minima = [one.minimum.float() for one in few if isinstance(one, Int4Linear)]
            if minima:
                key = f"{PREFIX}{source.name}.{MINIMUM}"
                tensors[key] = _narrow(joined(decoder, source, minima))
    return tensors, {"peft_type": "PEQA", "block_size": BLOCK}


def _narrow(values: Tensor) -> Tensor:
    return values.half() if torch.equal(values.half().float(), values) else values.clone()


def read_scales(reader: Reader) -> dict[str, Scales]:
    """Our name of each matrix → its scales, checked against the decoder."""
    found: dict[str, Scales] = {}
    for name, parts in reader.by_module(f"({SCALE})|({MINIMUM})").items():
        source, inputs, rows = reader.sizes(name)
        layers = [reader.decoder.get_submodule(one) for one in source.ours]
        if not all(isinstance(one, FewBits) for one in layers):
            raise FileError(
                f"{reader.file} moves the scales of {name}",
                rule="but this base keeps it in no 4 or 8 bits",
                next="load the very file that it was trained on, with quantised=True",
            )
        for leaf, tensor in parts.items():
            if tensor.shape != (sum(rows), inputs // BLOCK):
                raise FileError(
                    f"{reader.file}: {leaf} of {name} is {list(tensor.shape)}",
                    rule=f"but the base model asks for {[sum(rows), inputs // BLOCK]}",
                    next="check that the adapter was made for this base model",
                )
        if SCALE not in parts:
            raise FileError(
                f"{reader.file}: {SCALE} of {name}", rule="is missing", next="train it again"
            )
        scale = reader.parts(source, parts[SCALE], rows)
        minima = reader.parts(source, parts[MINIMUM], rows) if MINIMUM in parts else {}
        found |= {one: Scales(part, minima.get(one)) for one, part in scale.items()}
    return found
