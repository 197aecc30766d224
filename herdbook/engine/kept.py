"""A decoder's matrices of 4 or 8 bits, as the native step takes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from herdbook.engine import native
from herdbook.engine.native import Blocks
from herdbook.model.decoder import Decoder
from herdbook.model.layers import Int4Linear, Int8Linear, RMSNorm


class Kept:
    """The native step's source."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.config = decoder, decoder.config

    @torch.no_grad()
    def blocks(self, name: str) -> Blocks:
        decoder = self.decoder
        layer = decoder.head_layer if name == "head" else decoder.get_submodule(name)
        if isinstance(layer, Int4Linear):
            codes, scale, minimum = layer.codes, layer.scale, layer.minimum
            return Blocks(codes.numpy(), scale.numpy(), minimum.numpy())
        if isinstance(layer, Int8Linear):
            return Blocks(layer.codes.numpy(), layer.scale[..., 0].numpy())
        assert name == "head"
        return Blocks.rounded(decoder.head_layer.dense(torch.float32).numpy())

    def floats(self, name: str) -> np.ndarray | None:
        parent, _, leaf = name.rpartition(".")
        module = self.decoder
        for one in parent.split("."):
            module = getattr(module, one)
            if module is None:
                return None
        found: Tensor | None = getattr(module, leaf)
        return None if found is None else found.detach().float().numpy()

    @torch.inference_mode()
    def embed(self, ids: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.decoder.embed(torch.from_numpy(ids)).float().numpy()
        return found


def kept(decoder: Decoder) -> Kept | None:
    """What the native step reads of a decoder; None where it does not fit."""
    if type(decoder) is not Decoder or decoder.headless or decoder.soft is not None:
        return None
    if decoder.device.type != "cpu" or not isinstance(decoder.norm, RMSNorm):
        return None
    if not native.fits(decoder.config):
        return None
    matrices = {
        name: one
        for name, one in decoder.named_modules()
        if name.startswith("blocks.") and hasattr(one, "inputs")
    }
    if not all(isinstance(one, Int4Linear | Int8Linear) for one in matrices.values()):
        return None
    bits = {name: 4 if isinstance(one, Int4Linear) else 8 for name, one in matrices.items()}
    return Kept(decoder) if native.together(bits) else None
