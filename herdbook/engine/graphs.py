"""Decoding on a GPU: the whole step is recorded once as a CUDA graph and replayed.

A decoding step is hundreds of small kernels, and launching them from Python takes longer than they do.
A graph launches them all at once, but computes the same shapes in the same places each time. So a step
has a few sizes, its inputs lie in tensors that stay where they are, and the rows that a batch leaves
free compute a token that nobody asked for, whose key and value go into the cache's last page, which
the pool never hands out.

Shapes: R rows (one token of a sequence each, or free), B of them taken, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import partial

import torch
from torch import Tensor

from herdbook.engine.cache import Cache
from herdbook.engine.placed import positions_of, slots_of
from herdbook.engine.sequence import Sequence
from herdbook.engine.tiled import Kernel, Tiled, Tiles, splits_for
from herdbook.model.decoder import Decoder

#: rows of a recorded step; a larger batch is computed as it comes
SIZES = (1, 2, 4, 8, 16, 32, 64)

#: a process records one graph at a time, and each engine has a thread of its own
_RECORDING = threading.Lock()

log = logging.getLogger("herdbook.engine")


class Step:
    """A decoding step of R rows over inputs that keep their place. `compute` reads them on the device
    alone and never looks at a value."""

    def __init__(self, decoder: Decoder, cache: Cache, kernel: Kernel, rows: int) -> None:
        self._decoder, self._cache, self._kernel, self.rows = decoder, cache, kernel, rows
        self._free = cache.pages - 1
        c, device = decoder.config, decoder.device
        #: ids, slots, places in the sequence, contexts, and one or two positions: int64 [5 or 6, R]
        self._numbers = torch.zeros(
            (6 if c.position == "rope2d" else 5, rows), dtype=torch.int64, device=device
        )
        most = min(self._free, -(-c.max_pos // cache.page_tokens))
        self._pages = torch.full((rows, most), self._free, dtype=torch.int32, device=device)
        self._known = [[self._free] for _ in range(rows)]  # what its rows begin with

    def fill(self, batch: Many[Sequence]) -> None:
        """The batch takes the first rows; the others are free."""
        size, b = self._cache.page_tokens, len(batch)
        numbers = torch.zeros(self._numbers.shape, dtype=torch.int64)
        numbers[1] = self._free * size
        told = [
            [one.ids[one.computed] for one in batch],
            slots_of(batch, size),
            [one.computed for one in batch],
            [one.context.tokens if one.context else 0 for one in batch],
        ]
        numbers[:4, :b] = torch.tensor(told)
        numbers[4:, :b] = positions_of(batch, "cpu").view(b, -1).T
        self._numbers.copy_(numbers)
        used = [one.pages[: one.computed // size + 1] for one in batch]
        used += [[self._free]] * (self.rows - b)
        for row, pages in enumerate(used):
            if pages != self._known[row]:
                self._pages[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
                self._known[row] = pages

    def compute(self) -> Tensor:
        """float32 [R, V]."""
        ids, slots, starts, contexts = self._numbers[:4].unbind()
        positions = self._numbers[4:].T.squeeze(1)
        row = torch.arange(self.rows, device=ids.device)
        where = torch.stack([row, row, torch.ones_like(row), starts], -1).int()
        splits = splits_for(self.rows, self._decoder.config.kv_heads)
        tiles = Tiles(where, 1, self._pages, contexts.int(), splits)
        layout = Tiled(self._cache, self._kernel, [tiles], positions, slots)
        return self._decoder.logits(self._decoder(ids, layout))


#: computes a step with the inputs that are there: logits [R, V], until the next one
Replay = Callable[[], Tensor]


class Recorder:
    """Records steps as CUDA graphs, which share the memory of what they compute on the way."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Replay:
        """Where that fails, the step itself, which is launched kernel by kernel."""
        graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what compiles and chooses on its first call has done so
            for _ in range(2):
                step.compute()
        torch.cuda.current_stream().wait_stream(aside)
        record = torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local")
        try:
            with _RECORDING, record:
                logits = step.compute()
        except RuntimeError as error:
            log.warning("decoding %d rows without a CUDA graph, slower: %s", step.rows, error)
            return step.compute

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


class Graphs:
    """The decoding steps of a runner, each recorded when a batch of its size first comes.

    The cache has one page more than the pool.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache,
        kernel: Kernel,
        record: Callable[[Step], Replay] | None = None,
    ) -> None:
        self._record = record or Recorder()
        self._make = partial(Step, decoder, cache, kernel)
        self._steps: dict[int, tuple[Step, Replay]] = {}

    def serves(self, batch: Many[Sequence]) -> bool:
        """Whether each of the batch computes one token, wants logits after it, and nothing else."""
        return len(batch) <= SIZES[-1] and all(
            one.scheduled == one.wanted == 1
            and one.adapter is None
            and one.computed >= one.front
            and not (one.reading and one.reading.rest)
            for one in batch
        )

    def run(self, batch: Many[Sequence]) -> Tensor:
        """Logits [B, V], which the next step overwrites."""
        rows = next(size for size in SIZES if size >= len(batch))
        if rows not in self._steps:
            step = self._make(rows)
            step.fill(batch)
            self._steps[rows] = step, self._record(step)
        step, replay = self._steps[rows]
        step.fill(batch)
        return replay()[: len(batch)]


def recordable(decoder: Decoder) -> bool:
    """Whether its steps are the same for all tokens: experts compute those that choose them."""
    return decoder.memory == "pages" and not decoder.config.experts
