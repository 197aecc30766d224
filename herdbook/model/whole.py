"""The embedding and the head trained whole, beside an adapter: what peft calls modules_to_save.

A new language's tokens have rows of their own, which no correction of the blocks can teach. (Cui et
al., "Chinese-LLaMA-Alpaca", 2023, arXiv:2304.08177: LoRA on all blocks, these two whole.) The base's
own matrix stays beside the trained one, so that the base can still be asked (`lora.bypass`).

Where the head is tied to the embedding there is one matrix, which is trained as both.

`TrainedRows`: of either, the rows of some tokens alone, those that a vocabulary was extended by; the
others stay to the last bit, and an adapter stores but those rows (peft's trainable_token_indices).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from herdbook.model.decoder import Decoder
from herdbook.model.lora import Adapter, replace


class Whole(Adapter):
    """A layer's matrix [vocab, hidden] (and bias), kept, and trained beside it in float32 at least."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        #: what it computes in, which is the base's
        self.dtype: torch.dtype = getattr(base, "dtype", None) or base.weight.dtype
        start = base.dense(torch.promote_types(self.dtype, torch.float32)).detach()
        self.matrix = nn.Parameter(start.clone())
        bias = getattr(base, "bias", None)
        self.vector = None if bias is None else nn.Parameter(bias.detach().to(start.dtype).clone())

    @property
    def weight(self) -> Tensor:
        """The matrix in force, as it multiplies."""
        return self.dense(self.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        base: Any = self.base
        kept: Tensor = base.dense(dtype)
        return kept if self.bypassed else self.matrix.to(dtype)

    def _multiply(self, x: Tensor) -> Tensor:
        vector = None if self.vector is None else self.vector.to(x.dtype)
        return F.linear(x, self.matrix.to(x.dtype), vector)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        base: Any = self.base
        base.weight.copy_(self.matrix)
        if self.vector is not None:
            base.bias.copy_(self.vector)
        return self.base


class WholeEmbedding(Whole):
    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] → [T, hidden]"""
        y: Tensor = self.base(ids) if self.bypassed else F.embedding(ids, self.matrix)
        return y.to(self.dtype)

    def project(self, x: Tensor) -> Tensor:
        """The tied head: x [T, hidden] → [T, vocab]."""
        base: Any = self.base
        y: Tensor = base.project(x) if self.bypassed else self._multiply(x)
        return y


class WholeLinear(Whole):
    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, vocab]"""
        y: Tensor = self.base(x) if self.bypassed else self._multiply(x)
        return y


class TrainedRows(Adapter):
    """A layer's matrix [vocab, hidden], frozen but for the rows of some ids: [n, hidden], float32 at
    least. A bias stays as it is."""

    ids: Tensor
    place: Tensor

    def __init__(self, base: Any, ids: Tensor) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dtype: torch.dtype = getattr(base, "dtype", None) or base.weight.dtype
        start = base.dense(torch.promote_types(self.dtype, torch.float32)).detach()
        ids = ids.to(start.device)
        self.ids = nn.Buffer(ids, persistent=False)
        self.rows = nn.Parameter(start[ids].clone())
        place = torch.full((len(start),), -1, device=start.device)
        place[ids] = torch.arange(len(ids), device=start.device)
        self.place = nn.Buffer(place, persistent=False)  # a token's row of `rows`, or -1

    @property
    def weight(self) -> Tensor:
        """The matrix in force, as it multiplies."""
        return self.dense(self.dtype)

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = getattr(self.base, "bias", None)
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        base: Any = self.base
        kept: Tensor = base.dense(dtype)
        return kept if self.bypassed else kept.index_copy(0, self.ids, self.rows.to(dtype))

    def _scored(self, y: Tensor, x: Tensor) -> Tensor:
        """y [T, vocab], what the base says to x [T, hidden], with the trained rows' own."""
        vector = None if self.bias is None else self.bias[self.ids]
        return y.index_copy(-1, self.ids, F.linear(x, self.rows.to(x.dtype), vector))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        base: Any = self.base
        base.weight.index_copy_(0, self.ids, self.rows.to(base.weight.dtype))
        return self.base


class RowsEmbedding(TrainedRows):
    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] → [T, hidden]"""
        y: Tensor = self.base(ids)
        if self.bypassed:
            return y
        place = self.place[ids]
        mine = F.embedding(place.clamp_min(0), self.rows).to(y.dtype)
        return torch.where(place[:, None] >= 0, mine, y)

    def project(self, x: Tensor) -> Tensor:
        """The tied head: x [T, hidden] → [T, vocab]."""
        base: Any = self.base
        y: Tensor = base.project(x)
        return y if self.bypassed else self._scored(y, x)


class RowsLinear(TrainedRows):
    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] → [T, vocab]"""
        y: Tensor = self.base(x)
        return y if self.bypassed else self._scored(y, x)


def train_rows(decoder: Decoder, name: str, ids: Tensor) -> TrainedRows:
    """Train these rows of the embedding ("embed") or the head ("head"), from what they are now."""
    kind = RowsEmbedding if name == "embed" else RowsLinear
    layer = kind(decoder.get_submodule(name), ids)
    replace(decoder, name, layer)
    return layer


def train_whole(decoder: Decoder, name: str) -> Whole:
    """Train the embedding ("embed") or the head ("head") whole, from what it is now."""
    kind = WholeEmbedding if name == "embed" else WholeLinear
    layer = kind(decoder.get_submodule(name))
    replace(decoder, name, layer)
    return layer
