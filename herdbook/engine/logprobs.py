"""How probable tokens were to the model, from its raw logits.

Shapes: R rows, V tokens of the vocabulary. A row's logprobs are the log-softmax of its own logits in
float32: bias, penalties, temperature and grammars, which only steer what is drawn, do not change them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from herdbook.engine.request import Logprob

if TYPE_CHECKING:
    from herdbook.engine.sequence import Sequence


def logprobs(table: Tensor, ids: Many[int], top: int) -> list[Logprob]:
    """For each row of log-probabilities [R, V] that of its token ids[r], and of the `top` greatest."""
    mine = table.gather(1, torch.tensor(ids, device=table.device)[:, None])
    ranks = (table > mine).sum(dim=1) + 1
    best, tokens = table.topk(min(top, table.shape[1]))
    rows = (ranks.tolist(), mine[:, 0].tolist(), tokens.tolist(), best.tolist())
    return [
        Logprob(id, logprob, rank, tuple(zip(others, theirs, strict=True)))
        for id, rank, logprob, others, theirs in zip(ids, *rows, strict=True)
    ]


def of_drawn(
    logits: Tensor, tokens: Many[int | Exception], batch: Many[Sequence]
) -> list[Logprob | None]:
    """Of what was drawn from each row of logits [B, V], for the sequences that ask for it."""
    out: list[Logprob | None] = [None] * len(batch)
    for row, (token, sequence) in enumerate(zip(tokens, batch, strict=True)):
        top = sequence.request.sampling.logprobs
        if top is not None and isinstance(token, int):
            table = logits[row : row + 1].float().log_softmax(-1)
            [out[row]] = logprobs(table, [token], top)
    return out
