"""A frozen base larger than memory: its blocks' matrices are read when a block computes, and held by one.

    forward    block 0 … block n        each reads its matrices, computes, and gives them up to the next
    backward   block n … block 0        each reads them again, computes what it did not keep, and its
                                        gradients

Read into memory of their own and not mapped: bytes that lie otherwise aligned in a file are multiplied
in another order, and what is learnt would not be the same to the last bit. The system's file cache holds
the file while there is room. Norms, biases, the embedding and the head stay.

A block must be recomputed on the way back (`Decoder.recompute`): what autograd kept of it would be gone.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from herdbook.errors import FileError
from herdbook.model.at_once import at_once

if TYPE_CHECKING:
    from herdbook.model.checkpoint.base import Checkpoint
    from herdbook.model.decoder import Decoder

#: numbers at which a matrix begins: as torch's own memory is aligned, whatever the type
ALIGNED = 64


class Streamed:
    """Where the matrices of a decoder's blocks come from, and those that are here."""

    def __init__(self, decoder: Decoder, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.decoder, self.checkpoint, self.dtype = decoder, checkpoint, dtype
        #: of each block, by their names in the checkpoint
        self.matrices: list[dict[str, nn.Parameter]] = [{} for _ in decoder.blocks]
        self.here = -1
        self.mark = _mark(checkpoint.path)
        for number, block in enumerate(decoder.blocks):
            block.register_forward_pre_hook(lambda *_, number=number: self.fetch(number))

    def put(self, name: str, shape: tuple[int, ...]) -> nn.Parameter | None:
        """A parameter that is not there yet; None where this one is to stay."""
        room, number, *_ = name.split(".")
        if room != "blocks" or len(shape) < 2:
            return None
        weight = nn.Parameter(self._nothing(shape), requires_grad=False)
        self.matrices[int(number)][name] = weight
        return weight

    def fetch(self, number: int) -> None:
        """Let this block have its matrices, and no other."""
        assert self.decoder.recompute or not torch.is_grad_enabled(), "would keep what is gone"
        if number == self.here:
            return
        if _mark(self.checkpoint.path) != self.mark:
            raise FileError(
                f"{self.checkpoint.path}",
                rule="was changed while a model was trained beside it",
                next="give the command again: it goes on from its last state if the weights are the same",
            )
        for weight in self.matrices[self.here].values() if self.here >= 0 else ():
            weight.data = self._nothing(weight.shape)
        self.here = -1
        mine = self.matrices[number]
        sizes = [-(-one.numel() // ALIGNED) * ALIGNED for one in mine.values()]
        # one piece, so that those that are multiplied together lie side by side
        whole = torch.empty(sum(sizes), dtype=self.dtype)
        fills = []
        for (name, weight), piece in zip(mine.items(), torch.split(whole, sizes), strict=True):
            weight.data = piece[: weight.numel()].view(weight.shape)
            fills.append(self.checkpoint.steps(name, weight.data))
        at_once(chain.from_iterable(fills))
        self.here = number

    def _nothing(self, shape: Any) -> Tensor:
        """Of this shape, and of no size."""
        return torch.empty(1, dtype=self.dtype).expand(shape)


def _mark(path: Path) -> list[tuple[str, int, int, int]]:
    """Tells other files than those that were opened."""
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    about = [(one.name, one.stat()) for one in files if one.is_file()]
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in about]


def held_bytes(decoder: Decoder, *, streamed: bool) -> int:
    """Bytes of a decoder's weights in memory; streamed: of its blocks' frozen matrices, one block's."""
    held = sum(one.nbytes for one in (*decoder.parameters(), *decoder.buffers()))
    if streamed:
        blocks = [
            sum(one.nbytes for one in block.parameters() if one.ndim > 1 and not one.requires_grad)
            for block in decoder.blocks
        ]
        held += max(blocks) - sum(blocks)
    return held
