"""The memory of the key/value cache: how large, in which numbers, and as the native step has it.

Who holds which page is pages.py's part, the PyTorch side of it cache.py's.
"""

from __future__ import annotations

import numpy as np

from herdbook.errors import CapacityError
from herdbook.model.config import DecoderConfig
from herdbook.model.interface import Model
from herdbook.training.memory import free_bytes

#: the cache's size unless it is given: this, or what 4096 tokens need where that is more
CACHE_BYTES = 2**30
CACHE_TOKENS = 4096
#: and never more than this many full contexts
CACHE_CONTEXTS = 16
#: bytes of a number, by the name of its format
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
#: those that the native step reads and writes, and what numpy has for them
NATIVE = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}


class Store:
    """Keys and values of every layer as native.cpp reads them, so that a register holds one dimension
    of many keys: keys [pages, KV, D, page_tokens], values [pages, KV, page_tokens, D].

    kind: one of NATIVE. With int8 every token's keys and values of a head have a scale of their own,
    absmax / 127: scales [pages, 2, KV, page_tokens] float32, else none. The operating system gives
    the memory page by page as it is written.
    """

    def __init__(self, config: DecoderConfig, pages: int, page_tokens: int, kind: str) -> None:
        self.pages, self.page_tokens, self.kind = pages, page_tokens, kind
        self.itemsize = ITEMSIZE[kind]
        heads, width = config.kv_heads, config.head_dim
        layers, number = range(config.layers), NATIVE[kind]
        self.keys = [np.zeros((pages, heads, width, page_tokens), number) for _ in layers]
        self.values = [np.zeros((pages, heads, page_tokens, width), number) for _ in layers]
        self.scales = [
            np.zeros((pages, 2, heads, page_tokens), np.float32) for _ in layers if kind == "int8"
        ]


def token_bytes(config: DecoderConfig, kind: str) -> int:
    """What the cache needs for a token's keys and values."""
    heads = 2 * config.layers * config.kv_heads
    return heads * (config.head_dim * ITEMSIZE[kind] + (4 if kind == "int8" else 0))


def cache_kind(model: Model, cache_bytes: int | None, beside: int = 0) -> str:
    """The widest in which the cache holds a context, or CACHE_TOKENS of it. beside: see cache_pages."""
    if model.memory != "pages":
        return model.kind
    if cache_bytes is None:
        cache_bytes = free_on(model.place) // 2
    tokens = min(model.config.max_pos, CACHE_TOKENS)
    for kind in (model.kind, "bfloat16"):
        if tokens * (token_bytes(model.config, kind) + beside) <= cache_bytes:
            return kind
    return "int8"


def free_on(place: str) -> int:
    """Bytes that the memory of a kind of device can still give."""
    if place != "cuda":
        return free_bytes()
    import torch

    return int(torch.cuda.mem_get_info()[0])


def cache_pages(
    config: DecoderConfig,
    kind: str,
    page_tokens: int,
    cache_bytes: int | None,
    beside: int = 0,
    place: str = "cpu",
) -> int:
    """How many pages the cache gets. beside: bytes that a token needs in a draft model's cache.

    On a GPU, where all of it is taken at once, no more than what is free there, and by itself half.
    """
    each = token_bytes(config, kind) + beside
    if place == "cuda":
        free = free_on(place)
        if cache_bytes is None:
            cache_bytes = min(cache_pages(config, kind, 1, None, beside) * each, free // 2)
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
