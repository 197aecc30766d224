"""How probable tokens were to the model, from its raw logits.

Shapes: R rows, V tokens of the vocabulary. A row's logprobs are the log-softmax of its own logits in
float32: bias, penalties, temperature and grammars, which only steer what is drawn, do not change them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import numpy as np

from herdbook.engine.request import Logprob
from herdbook.engine.sampling import greatest

if TYPE_CHECKING:
    from herdbook.engine.sequence import Sequence


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of each row of logits [R, V]."""
    below: np.ndarray = logits - logits.max(-1, keepdims=True)
    below -= np.log(np.exp(below).sum(-1, keepdims=True))
    return below


def logprobs(table: np.ndarray, ids: Many[int], top: int) -> list[Logprob]:
    """For each row of log-probabilities [R, V] that of its token ids[r], and of the `top` greatest."""
    out = []
    for row, id in zip(table, ids, strict=True):
        rank = int((row > row[id]).sum()) + 1
        best, tokens = greatest(row, top)
        others = tuple(zip(tokens.tolist(), best.tolist(), strict=True))
        out.append(Logprob(id, float(row[id]), rank, others))
    return out


def of_drawn(
    logits: np.ndarray, tokens: Many[int | Exception], batch: Many[Sequence]
) -> list[Logprob | None]:
    """Of what was drawn from each row of logits [B, V], for the sequences that ask for it."""
    out: list[Logprob | None] = [None] * len(batch)
    for row, (token, sequence) in enumerate(zip(tokens, batch, strict=True)):
        top = sequence.request.sampling.logprobs
        if top is not None and isinstance(token, int):
            table = log_softmax(logits[row : row + 1])
            [out[row]] = logprobs(table, [token], top)
    return out
