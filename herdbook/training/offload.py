"""The optimiser's state on disk, in a file that is mapped: in memory while a weight is moved, no longer.

    for each weight:  its state's pages come in from the file → the weight is moved → they go

AdamW keeps 8 bytes of each weight that it moves, a full tuning's largest part but for weights and
gradients. The file has no name, so nothing is left of it whatever ends the process; a run goes on from
the state that was last saved whole (see state.py), and from nothing else. What the optimiser computes
is the same to the last bit: the same operations on the same numbers, a weight at a time.

Pages that were written stay in the system's file cache while there is room for them, so where there is
room it costs little, and where there is none it costs the disk's speed: both ways, 16 bytes a weight and step.
"""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from herdbook.model.checkpoint.weights import as_bytes

#: the most bytes of state that any optimiser keeps of a number, its running average included
MOST_BYTES = 16
#: the most tensors of a weight's state; each begins on a page of its own
MOST_TENSORS = 8


class Offload:
    """Room on the disk of `folder` for what an optimiser keeps of these weights.

    The room is only counted at first (a sparse file); each tensor's part of it is written when the
    tensor comes, so that a full disk is an OSError and not a bus error.
    """

    def __init__(self, folder: Path, weights: Iterable[nn.Parameter]) -> None:
        page = mmap.ALLOCATIONGRANULARITY
        size = sum(MOST_BYTES * w.numel() + MOST_TENSORS * page for w in weights)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as this
        weakref.finalize(self, self._file.close)  # and with it and the tensors goes the room
        self._file.truncate(size)
        self._map = mmap.mmap(self._file.fileno(), size)
        self._first = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        self._at, self._size = 0, size

    def keep(self, state: dict[str, Tensor]) -> None:
        """The tensors of a weight's state lie in the file from now on, and none of it in memory."""
        new = [key for key, value in state.items() if value.ndim and not self._has(value)]
        for key in new:
            state[key] = self._put(state[key])
        if new and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory
            libc.malloc_trim(0)
        self.release()

    def release(self) -> None:
        """Let go of what was read or written; it comes back from the file when it is touched."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _has(self, tensor: Tensor) -> bool:
        return 0 <= tensor.data_ptr() - self._first < self._size

    def _put(self, tensor: Tensor) -> Tensor:
        start, page = self._at, mmap.ALLOCATIONGRANULARITY
        self._at += -(-tensor.nbytes // page) * page
        assert self._at <= self._size, "an optimiser keeps more than MOST_BYTES of a number"
        self._file.seek(start)
        self._file.write(as_bytes(tensor.contiguous()))
        self._file.flush()
        flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=start)
        return flat.view(tensor.shape)


def one_by_one(optimiser: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Each weight in turn; until the next is asked for, it is the only one that the optimiser knows."""
    groups = [(group, group["params"]) for group in optimiser.param_groups]
    try:
        for group, _ in groups:
            group["params"] = []
        for group, parameters in groups:
            for p in parameters:
                group["params"] = [p]
                yield p
            group["params"] = []
    finally:
        for group, parameters in groups:
            group["params"] = parameters
