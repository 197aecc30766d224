"""The tensors of the key/value cache as PyTorch reads and writes them.

How large it is store.py says, who holds which page pages.py.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from herdbook.engine.store import Store
from herdbook.model.decoder import Decoder


class Cache:
    """Keys and values of every layer, by page and place in it: logically [pages, page_tokens, KV, D].

    store: the native step's, seen here in this order. With int8 every token's keys and values of a
    head have a scale of their own, absmax / 127; where
    that is no normal number (absmax below 1.5e-36), they are zeros.
    The operating system gives the memory page by page as it is written. What nobody has written
    yet is zeros, and `start` sees to it that a page's new owner finds nothing of the old one: what is
    masked must still be a number, whatever went wrong in another sequence.
    """

    def __init__(
        self,
        decoder: Decoder,
        pages: int,
        page_tokens: int,
        dtype: torch.dtype | None = None,
        store: Store | None = None,
    ) -> None:
        c = decoder.config
        self.pages, self.page_tokens, self.dtype = pages, page_tokens, dtype or decoder.dtype
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        #: of keys and of values, [pages, page_tokens, 2, KV] float32; empty unless int8
        self.scales: list[Tensor] = []
        if store is not None:
            self.keys = [self._seen(one).permute(0, 3, 1, 2) for one in store.keys]
            self.values = [self._seen(one).transpose(1, 2) for one in store.values]
            self.scales = [torch.from_numpy(one).permute(0, 3, 1, 2) for one in store.scales]
            return
        zeros = partial(_zeros, dtype=self.dtype, device=decoder.device)
        if decoder.memory != "pages":
            return
        for _ in range(c.layers):
            shape = (pages, page_tokens, c.kv_heads, c.head_dim)
            self.keys.append(zeros(shape))
            self.values.append(zeros(shape))
            if self.dtype == torch.int8:
                shape = (pages, 2, c.kv_heads, page_tokens)
                self.scales.append(zeros(shape, dtype=torch.float32).permute(0, 3, 1, 2))

    def _seen(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).view(self.dtype)

    def start(self, layer: int, pages: Tensor) -> None:
        """Zero `pages` [P], which a step begins and does not fill."""
        for one in (self.keys, self.values, self.scales):
            if one:
                one[layer][pages] = 0

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v [T, KV, D] at `slots` [T] (page × page_tokens + place in the page)."""
        page, at = slots // self.page_tokens, slots % self.page_tokens
        if self.scales:
            both = torch.stack([k, v], 1).float()  # [T, 2, KV, D]
            scale = both.abs().amax(-1) / 127
            scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
            self.scales[layer][page, at] = scale
            codes = both * torch.where(scale > 0, 1 / scale, 0.0)[..., None]
            k, v = codes.round().to(torch.int8).unbind(1)
        self.keys[layer][page, at] = k.to(self.dtype)
        self.values[layer][page, at] = v.to(self.dtype)

    def read(self, layer: int, pages: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [..., P, page_tokens, KV, D] of the pages [..., P].

        Pages that follow one another (a slice) are read where they lie, others are gathered.
        """
        k, v = self.keys[layer][pages], self.values[layer][pages]
        if self.scales:
            scale = self.scales[layer][pages][..., None]
            return (k * scale[..., 0, :, :]).to(dtype), (v * scale[..., 1, :, :]).to(dtype)
        return k.to(dtype), v.to(dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only where they are written (torch's own are written at once)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
        .view(dtype)
        .view(shape)
    )
