"""How a checkpoint packs several of our tensors into one, or keeps one in another order.

A fold says, for the rows of our tensors put end to end, which row of the source's each one is. So
reading is picking rows, writing is the inverse permutation, and it works alike for weights, biases
and the raw blocks of a quantised file; that the two are inverse needs no proof for each family.

    ours   q [H·D, I], k [KV·D, I], v [KV·D, I]   end to end
    source row_of[i] = the source's row that our row i is

H query heads, KV key/value heads, D head_dim, R rotating dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from herdbook.model.config import DecoderConfig

if TYPE_CHECKING:
    from torch import Tensor

#: config → int64 [rows]
Order = Callable[[DecoderConfig], np.ndarray]

QKV = tuple(f"blocks.{{n}}.attention.{one}" for one in "qkv")


@dataclass(frozen=True)
class Fold:
    """One tensor of the source.

    parts: the modules of ours that it holds ({n} the layer, {e} every expert in turn). order: the
    source's row of each of our rows, parts end to end; None: they lie end to end there as well.
    transposed: the source keeps a matrix as [in, out]. stacked: it has an axis of its own for the
    parts. plus: is added to the source's values.
    """

    parts: tuple[str, ...]
    order: Order | None = None
    transposed: bool = False
    stacked: bool = False
    plus: float = 0.0

    def take(self, source: Any, part: int, rows: Sequence[int], config: DecoderConfig) -> Any:
        """Part number `part` out of the source's tensor (or, untransposed, of an array in its order);
        rows: how many each part has."""
        if self.transposed and source.ndim == 2:
            source = source.T
        if self.stacked:
            source = source.flatten(0, 1)
        start = sum(rows[:part])
        mine = slice(start, start + rows[part])
        found = source[mine] if self.order is None else source[self.order(config)[mine]]
        return found + self.plus if self.plus else found

    def row_of(self, part: int, rows: Sequence[int], config: DecoderConfig) -> np.ndarray:
        """int64: the source's row of each of the part's, where nothing is transposed or added."""
        start = sum(rows[:part])
        end = start + rows[part]
        # of its own: a view would keep the rows of the whole stack
        return np.arange(start, end) if self.order is None else self.order(config)[start:end].copy()

    def join(self, parts: Sequence[Tensor], config: DecoderConfig) -> Tensor:
        """The source's tensor again."""
        import torch  # a description is read without it

        whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        if self.order is not None:
            whole = whole[np.argsort(self.order(config))]
        if self.stacked:
            whole = whole.view(len(parts), -1, *whole.shape[1:])
        if self.transposed and whole.ndim == 2:
            whole = whole.T
        return whole - self.plus if self.plus else whole

    def shape(self, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The source's shape, from those of the parts."""
        rows, rest = sum(part[0] for part in parts), parts[0][1:]
        if self.stacked:
            return (len(parts), parts[0][0], *rest)
        return (*rest, rows) if self.transposed else (rows, *rest)


# --- orders ----------------------------------------------------------------------------------------


def qkv_by_head(config: DecoderConfig) -> np.ndarray:
    """The source's rows are, head by head, [q | k | v] (BLOOM, GPT-NeoX, ChatGLM-6B)."""
    at = np.arange(3 * config.heads * config.head_dim)
    return at.reshape(config.heads, 3, config.head_dim).swapaxes(0, 1).flatten()


def qkv_by_group(config: DecoderConfig) -> np.ndarray:
    """Group by group, [its query heads | k | v] (Falcon, InternLM 2)."""
    each = config.heads // config.kv_heads
    rows = np.arange(config.kv_heads * (each + 2) * config.head_dim)
    at = rows.reshape(config.kv_heads, each + 2, config.head_dim)
    return np.concatenate(
        [at[:, :each].flatten(), at[:, each].flatten(), at[:, each + 1].flatten()]
    )


def qkv_by_shard(config: DecoderConfig) -> np.ndarray:
    """Four shards (of the machine it was trained on), each [q | v | k] (CodeGen, MOSS)."""
    at = np.arange(3 * config.heads * config.head_dim).reshape(4, 3, -1)
    return np.concatenate([at[:, 0].flatten(), at[:, 2].flatten(), at[:, 1].flatten()])


def rotating(heads: Callable[[DecoderConfig], int]) -> Order:
    """Heads whose R rotating rows lie as pairs side by side, where ours are in two halves."""

    def order(config: DecoderConfig) -> np.ndarray:
        count, size = heads(config), config.head_dim
        turning = config.rope_dim or size
        at = np.arange(count * size).reshape(count, size)
        pairs = at[:, :turning].reshape(count, -1, 2).swapaxes(1, 2).reshape(count, -1)
        return np.concatenate([pairs, at[:, turning:]], 1).flatten()

    return order


Q_ROTATING = rotating(lambda config: config.heads)
K_ROTATING = rotating(lambda config: config.kv_heads)


def qkv_rotating(packed: Order | None) -> Order:
    """q, k and v as `packed` has them (None: end to end), q and k with pairs side by side besides."""

    def order(config: DecoderConfig) -> np.ndarray:
        q, k = Q_ROTATING(config), K_ROTATING(config)
        rest = np.arange(len(k))  # v, as many rows as k
        mine = np.concatenate([q, len(q) + k, len(q) + len(k) + rest])
        return mine if packed is None else packed(config)[mine]

    return order
