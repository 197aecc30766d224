"""Adapters beside one base model: each request chooses its own, all in one batch.

    y[T, O] = x Wᵀ                     the base, once for the whole batch
    y[rows] += scale · (x[rows] Aᵀ) Bᵀ   each adapter, for the rows of its requests

and with DoRA the rows, with IA3 inputs or outputs are scaled as well. PEQA's rows are computed again,
with the codes of the base and scales of their own.

An adapter sits on the base's layers as a hook that does nothing unless `applied` has named its rows,
so the base's own requests compute what they would without it, and no weight is changed. Chen et al.,
"Punica", 2023 (arXiv:2310.18547); Sheng et al., "S-LoRA", 2023 (arXiv:2311.03285).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from herdbook.errors import RequestError
from herdbook.model.decoder import Decoder
from herdbook.model.peqa import FewBits
from herdbook.training import peft_format
from herdbook.training.peft_matrices import Factors, LowRank
from herdbook.training.peft_scales import Scales

if TYPE_CHECKING:
    from herdbook.engine.sequence import Sequence


class Adapter:
    """One adapter, ready on a decoder's layers. key: what tells its pages from others'."""

    def __init__(self, decoder: Decoder, folder: Path) -> None:
        found = peft_format.read(decoder, folder)
        if found.whole:
            raise RequestError(
                f"{folder} brings an {' and a '.join(found.whole)} of its own",
                rule="and requests of one batch share the base's",
                next="load the adapter's own reference, or merge it (step Merge)",
            )
        if found.config != decoder.config:
            raise RequestError(
                f"{folder} was trained with a stretched rotation",
                rule="and requests of one batch share the base's",
                next="load the adapter's own reference, or merge it (step Merge)",
            )
        inside = next((name for name in found.layers if ".experts." in name), None)
        if inside is not None:
            raise RequestError(
                f"{folder} tunes {inside}",
                rule="which sees the tokens in another order than the requests",
                next="merge it into its base (step Merge), and serve the merged model",
            )
        digest = hashlib.blake2b(digest_size=16)
        for file in (peft_format.CONFIG, peft_format.WEIGHTS):
            digest.update(hashlib.blake2b((folder / file).read_bytes()).digest())
        self.key = digest.digest()
        #: virtual tokens, which are the first of its sequences
        self.soft = found.soft
        self.device = decoder.device
        self.rows: slice | Tensor | None = None  # of this pass
        self._hooks = []
        for name, one in found.layers.items():
            layer = decoder.get_submodule(name)
            if isinstance(one, LowRank):
                hook = layer.register_forward_hook(_Added(self, one, decoder, layer))
            elif isinstance(one, Scales):
                assert isinstance(layer, FewBits)
                hook = layer.register_forward_hook(_Rescaled(self, one.on(layer)))
            elif one.inputs:
                hook = layer.register_forward_pre_hook(_Scaled(self, one, decoder).inputs)
            else:
                hook = layer.register_forward_hook(_Scaled(self, one, decoder).outputs)
            self._hooks.append(hook)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _Added:
    """The correction of one layer: A [r, I] and B [O, r] · scale, added where the rows are."""

    def __init__(self, adapter: Adapter, found: LowRank, decoder: Decoder, layer: Any) -> None:
        place: Any = {"dtype": decoder.dtype, "device": decoder.device}
        self.adapter, self.scale = adapter, found.scale
        self.A_t, self.B_t = found.A.to(**place).T, found.B.to(**place).T
        #: of each output, DoRA's length as a share of what the sum of both matrices has
        self.length: Tensor | None = None
        if found.magnitude is not None:
            whole = layer.dense(torch.float32)
            whole = whole + found.scale * (found.B.float() @ found.A.float()).to(whole.device)
            self.length = (found.magnitude.to(whole.device) / whole.norm(dim=1)).to(**place)

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        """y [T, O] = layer(x [T, I]), changed in place."""
        rows = self.adapter.rows
        if rows is not None and self.length is not None:
            bias = 0 if (found := getattr(layer, "bias", None)) is None else found
            some = y[rows] - bias
            some.addmm_(inputs[0][rows] @ self.A_t, self.B_t, alpha=self.scale)
            y[rows] = some * self.length + bias
        elif isinstance(rows, slice):
            y[rows].addmm_(inputs[0][rows] @ self.A_t, self.B_t, alpha=self.scale)
        elif rows is not None:
            down = inputs[0][rows] @ self.A_t
            y.index_add_(0, rows, down @ self.B_t, alpha=self.scale)


class _Scaled:
    """IA3's factors of one layer, where the rows are."""

    def __init__(self, adapter: Adapter, found: Factors, decoder: Decoder) -> None:
        self.adapter = adapter
        self.factor = found.factor.to(dtype=decoder.dtype, device=decoder.device)

    def inputs(self, layer: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        """x [T, I], for this layer alone."""
        if self.adapter.rows is None:
            return None
        x = inputs[0].clone()
        x[self.adapter.rows] *= self.factor
        return x

    def outputs(self, layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        """y [T, O], changed in place."""
        if self.adapter.rows is not None:
            y[self.adapter.rows] *= self.factor


class _Rescaled:
    """A layer with the base's codes and PEQA's scales, where the rows are."""

    def __init__(self, adapter: Adapter, tuned: FewBits) -> None:
        self.adapter, self.tuned = adapter, tuned

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        """y [T, O], changed in place."""
        if self.adapter.rows is not None:
            y[self.adapter.rows] = self.tuned(inputs[0][self.adapter.rows])


@contextmanager
def applied(batch: Many[Sequence]) -> Iterator[None]:
    """Inside, a pass over the batch gives each sequence its adapter's corrections."""
    spans: dict[Adapter, list[range]] = {}
    at = 0
    for one in batch:
        if one.adapter is not None:
            spans.setdefault(one.adapter, []).append(range(at, at + one.scheduled))
        at += one.scheduled
    for adapter, mine in spans.items():
        first, end = mine[0].start, mine[-1].stop
        if end - first == sum(map(len, mine)):
            adapter.rows = slice(first, end)
        else:
            adapter.rows = torch.tensor(
                [row for span in mine for row in span], device=adapter.device
            )
    try:
        yield
    finally:
        for adapter in spans:
            adapter.rows = None
