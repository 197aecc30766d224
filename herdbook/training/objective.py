"""What is learnt: the objectives that the loop can be given.

`NextToken` alone so far: the words of a conversation's assistant, and staying what the base is on
rows to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from herdbook.model.decoder import Decoder
from herdbook.model.fused import as_if_learning
from herdbook.model.layout import Packed
from herdbook.model.lora import bypass
from herdbook.model.mlp import Experts
from herdbook.tokens.chat import Rendering
from herdbook.tokens.packing import Pack, pack
from herdbook.training.loss import IGNORE, linear_cross_entropy, linear_divergence, next_tokens


@dataclass(frozen=True)
class Anchor(Rendering):
    """A row on which the tuned model shall stay what its base is (data: `"learn": "keep"`)."""


@dataclass(frozen=True)
class AnchorPack(Pack):
    """A pack of anchors."""


class NextToken:
    """The objective of tuning on conversations: the next token, on the assistant's turns.

    Anchors are not learnt but kept: on each of their tokens the loss is KL(base ‖ tuned), the base
    being the same decoder with its adapters bypassed. To train on the base's own answers instead
    would sharpen the model (they are its likeliest words), and its perplexity rises.

    In a mixture of experts each token of the weight also pays `balance` times how unevenly the
    routers send the pack (see `mlp.Experts`), lest a few experts get everything and learn alone.
    """

    def __init__(self, decoder: Decoder, anchor: float = 1.0, balance: float = 0.0) -> None:
        self.decoder, self.anchor = decoder, anchor
        self.balance = balance
        self.mixtures = [one for one in decoder.modules() if isinstance(one, Experts)]
        moving = {name for name, one in decoder.named_parameters() if one.requires_grad}
        inside = {name for name in moving if name.startswith("blocks.")}
        ends = {name for name in moving if name.split(".")[0] in ("norm", "project_out", "head")}
        #: what the blocks read is the same in base and tuned model, and so is what scores the words
        self.same_start = inside | ends == moving
        self.same_head = not any(one.requires_grad for one in decoder.head_layer.parameters())
        first = min((int(name.split(".")[1]) for name in inside), default=0)
        self.first_adapted = first if self.same_start else 0  # below, both are the same

    def packs(self, rows: Sequence[Rendering], capacity: int) -> list[Pack]:
        rows = [
            type(row)(ids, mask)
            for row in rows
            for ids, mask in self.decoder.examples(row.ids, row.mask)
        ]
        capacity = max(capacity, *(len(row.ids) for row in rows))  # a model may add its marks
        anchors = [row for row in rows if isinstance(row, Anchor)]
        learnt, left_out = pack([row for row in rows if not isinstance(row, Anchor)], capacity)
        kept, too_long = pack(anchors, capacity)
        assert not left_out and not too_long, "rows that do not fit are dropped or refused before"
        return [*learnt, *(AnchorPack(one.ids, one.mask, one.lengths) for one in kept)]

    def weight(self, pack: Pack) -> int:
        if isinstance(pack, AnchorPack):
            return len(pack.ids)
        return int((next_tokens(pack.ids, pack.mask, pack.lengths) >= 0).sum())

    def loss(self, pack: Pack) -> Tensor:
        where = self.decoder.device
        ids = torch.tensor(pack.ids, dtype=torch.int64, device=where)
        layout = Packed(pack.lengths, device=where)
        decoder, first = self.decoder, self.first_adapted
        # what tuned and base model have in common must be the same to the last bit
        with as_if_learning() if isinstance(pack, AnchorPack) else nullcontext():
            shared = decoder.through(decoder.start(ids, layout), layout, 0, first)
            hidden = decoder.finish(decoder.through(shared, layout, first))  # [T, H]
        uneven = self._uneven() * self.weight(pack) if self.mixtures and self.balance else 0.0
        return self._loss(pack, layout, shared, hidden) + uneven

    def _uneven(self) -> Tensor:
        """balance · mean over the layers of their routers' imbalance in the pass just made."""
        found = [one.imbalance for one in self.mixtures if one.imbalance is not None]
        assert len(found) == len(self.mixtures), "the decoder is training"
        return self.balance * torch.stack(found).mean()

    def _loss(self, pack: Pack, layout: Packed, shared: Tensor, hidden: Tensor) -> Tensor:
        """Of the words. shared: what the first adapted block reads; hidden: the end, both [T, H]."""
        decoder, first, where = self.decoder, self.first_adapted, hidden.device
        if isinstance(pack, AnchorPack):
            with bypass(decoder), torch.no_grad(), as_if_learning():
                if not self.same_start:
                    layout = Packed(pack.lengths, device=where)
                    shared = decoder.start(torch.tensor(pack.ids, device=where), layout)
                base = decoder.finish(decoder.through(shared, layout, first))
                plain = decoder.config.plain_head and self.same_head
                kept = None if plain else decoder.logits(base).log_softmax(-1)
            if kept is not None:
                tuned = decoder.logits(hidden).log_softmax(-1)
                return self.anchor * kl_div(tuned, kept, reduction="sum", log_target=True)
            return self.anchor * linear_divergence(hidden, base, decoder.head_weight)
        targets = next_tokens(pack.ids, pack.mask, pack.lengths).to(where)
        if not decoder.config.plain_head:
            learnt = targets != IGNORE
            return cross_entropy(decoder.logits(hidden[learnt]), targets[learnt], reduction="sum")
        return linear_cross_entropy(hidden, decoder.head_weight, targets)
