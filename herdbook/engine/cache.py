"""The tensors of the key/value cache: how large, in which numbers, and where a page lies in them.

Who holds which page is pages.py's part.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from herdbook.errors import CapacityError
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.training.memory import free_bytes

#: the cache's size unless it is given: this, or what 4096 tokens need where that is more
CACHE_BYTES = 2**30
CACHE_TOKENS = 4096
#: and never more than this many full contexts
CACHE_CONTEXTS = 16


class Cache:
    """Keys and values of every layer, by page and place in it: logically [pages, page_tokens, KV, D].

    dimensions_first: keys lie in memory as [pages, KV, D, page_tokens] and values as
    [pages, KV, page_tokens, D], so that one register holds a dimension of many keys (native.cpp).
    With int8 every token's keys and values of a head have a scale of their own, absmax / 127.
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
        *,
        dimensions_first: bool = False,
    ) -> None:
        c = decoder.config
        self.pages, self.page_tokens, self.dtype = pages, page_tokens, dtype or decoder.dtype
        zeros = partial(_zeros, dtype=self.dtype, device=decoder.device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        #: of keys and of values, [pages, page_tokens, 2, KV] float32; empty unless int8
        self.scales: list[Tensor] = []
        if decoder.memory != "pages":
            return
        for _ in range(c.layers):
            if dimensions_first:
                shape = (pages, c.kv_heads, c.head_dim, page_tokens)
                self.keys.append(zeros(shape).permute(0, 3, 1, 2))
                self.values.append(zeros((*shape[:2], *shape[:1:-1])).transpose(1, 2))
            else:
                shape = (pages, page_tokens, c.kv_heads, c.head_dim)
                self.keys.append(zeros(shape))
                self.values.append(zeros(shape))
            if self.dtype == torch.int8:
                shape = (pages, 2, c.kv_heads, page_tokens)
                self.scales.append(zeros(shape, dtype=torch.float32).permute(0, 3, 1, 2))

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


def token_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What the cache needs for a token's keys and values."""
    heads = 2 * config.layers * config.kv_heads
    return heads * (config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))


def cache_dtype(decoder: Decoder, cache_bytes: int | None) -> torch.dtype:
    """The widest in which the cache holds a context, or CACHE_TOKENS of it."""
    if decoder.memory != "pages":
        return decoder.dtype
    if cache_bytes is None:
        cache_bytes = free_on(decoder.device) // 2
    tokens = min(decoder.config.max_pos, CACHE_TOKENS)
    for kind in (decoder.dtype, torch.bfloat16):
        if tokens * token_bytes(decoder.config, kind) <= cache_bytes:
            return kind
    return torch.int8


def free_on(device: torch.device) -> int:
    """Bytes that the device's memory can still give."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()


def cache_pages(
    config: DecoderConfig,
    dtype: torch.dtype,
    page_tokens: int,
    cache_bytes: int | None,
    beside: int = 0,
    device: torch.device | None = None,
) -> int:
    """How many pages the cache gets. beside: bytes that a token needs in a draft model's cache.

    On a GPU, where all of it is taken at once, no more than what is free there, and by itself half.
    """
    each = token_bytes(config, dtype) + beside
    if device is not None and device.type == "cuda":
        free = free_on(device)
        if cache_bytes is None:
            cache_bytes = min(cache_pages(config, dtype, 1, None, beside) * each, free // 2)
        elif cache_bytes > free:
            raise CapacityError(
                f"cache_bytes={cache_bytes}",
                rule=f"is more than the {free} bytes that are free on the GPU",
                next="give less, or leave it out",
            )
    if cache_bytes is None:
        tokens = max(CACHE_BYTES // each, CACHE_TOKENS)
        tokens = min(tokens, CACHE_CONTEXTS * config.max_pos)
    else:
        tokens = cache_bytes // each
        if tokens < page_tokens:
            raise CapacityError(
                f"cache_bytes={cache_bytes}",
                rule=f"holds no page: {page_tokens} tokens need {each * page_tokens} bytes",
                next=f"give at least {each * page_tokens}",
            )
    return max(1, tokens // page_tokens)
