"""The layout of the engine on a GPU: all sequences of a step are attended in one or two calls.

Shapes: T rows (tokens) of the batch, H query heads, D size of a head, N tiles, B sequences, P pages.

Which rows belong together, and where their keys lie, is told to the kernel as tensors: a program of it
takes a *tile*, some neighbouring rows of one sequence. Nothing here looks at a value on the GPU.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from herdbook.engine.cache import Cache
from herdbook.engine.placed import Placed, Virtual, positions_of, slots_of, virtual_of
from herdbook.engine.sequence import Sequence
from herdbook.model.attention import Look
from herdbook.model.config import DecoderConfig

#: query heads × rows of a tile of a prompt; half of it where a head is wider than WIDE
TILE, WIDE = 64, 128
#: as many programs as keep a GPU busy; with fewer tiles each tile's keys are split
PROGRAMS = 256
SPLITS = 16

log = logging.getLogger("herdbook.engine")


@dataclass(frozen=True)
class Tiles:
    """Rows of the batch that one call of the kernel attends.

    where: int32 [N, 4], a tile's sequence, its first row, how many rows, and that row's place in its
    sequence. rows: at most so many in a tile. pages: int32 [B, P]. contexts: int32 [B], so many tokens
    at the front of a sequence are seen by each of it. splits: the keys of a tile are walked over in so
    many parts; then its tiles are single rows.
    """

    where: Tensor
    rows: int
    pages: Tensor
    contexts: Tensor
    splits: int = 1


class Kernel(Protocol):
    """Attention over pages: for the rows of the tiles, q [T, H, D] → out [T, H, D]."""

    def __call__(
        self, q: Tensor, cache: Cache, layer: int, tiles: Tiles, look: Look, out: Tensor
    ) -> None: ...


@functools.cache
def kernel_for(device: str) -> Kernel | None:
    """The kernel for a type of device; None where PyTorch attends, sequence by sequence."""
    if device != "cuda":
        return None
    try:
        from herdbook.engine.triton_attention import look
    except ImportError as error:
        log.warning("attention goes sequence by sequence, slower: no Triton (%s)", error)
        return None
    return look


def splits_for(tiles: int, kv_heads: int) -> int:
    """Into how many parts the keys of each of so many tiles are split."""
    return max(1, min(SPLITS, PROGRAMS // (tiles * kv_heads)))


class Tiled(Placed):
    """Attention by a kernel that takes many sequences at once, call by call."""

    def __init__(
        self,
        cache: Cache,
        kernel: Kernel,
        calls: Many[Tiles],
        positions: Tensor,
        slots: Tensor,
        virtual: Many[Virtual] = (),
    ) -> None:
        super().__init__(cache, positions, slots, virtual)
        self._kernel, self._calls = kernel, calls

    def _look(self, layer: int, q: Tensor, k: Tensor, v: Tensor, look: Look) -> Tensor:
        q = q.contiguous()
        out = torch.empty_like(q)
        for tiles in self._calls:
            self._kernel(q, self._cache, layer, tiles, look, out)
        return out


def tiled(
    cache: Cache, batch: Many[Sequence], config: DecoderConfig, kernel: Kernel, device: torch.device
) -> Tiled:
    """The layout of a batch: one call for the sequences that compute one token, one for the others."""
    ones: list[tuple[int, int, int, int]] = []
    more: list[tuple[int, int, int, int]] = []
    tile = TILE if config.head_dim <= WIDE else TILE // 2
    rows = max(1, tile * config.kv_heads // config.heads)
    first = 0
    for number, one in enumerate(batch):
        n = one.scheduled
        for at in range(0, n, rows):
            where = (number, first + at, min(rows, n - at), one.computed + at)
            (more if n > 1 else ones).append(where)
        first += n
    most = max(len(one.pages) for one in batch)
    table = [one.pages + [0] * (most - len(one.pages)) for one in batch]
    pages = torch.tensor(table, dtype=torch.int32, device=device)
    seen = [one.context.tokens if one.context else 0 for one in batch]
    contexts = torch.tensor(seen, dtype=torch.int32, device=device)

    def call(tiles: list[tuple[int, int, int, int]], rows: int, splits: int) -> Tiles:
        where = torch.tensor(tiles, dtype=torch.int32, device=device)
        return Tiles(where, rows, pages, contexts, splits)

    calls = []
    if ones:
        calls.append(call(ones, 1, splits_for(len(ones), config.kv_heads)))
    if more:
        calls.append(call(more, rows, 1))
    slots = torch.tensor(slots_of(batch, cache.page_tokens), device=device)
    return Tiled(cache, kernel, calls, positions_of(batch, device), slots, virtual_of(batch))
