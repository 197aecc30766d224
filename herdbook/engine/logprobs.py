"""How probable tokens were to the model, from its raw logits.

Shapes: R rows of a step, V tokens of the vocabulary. A row's logprobs are the log-softmax of its own
logits in float32: bias, penalties, temperature and grammars, which only steer what is drawn, do not
change them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from herdbook.engine.request import Logprob
from herdbook.engine.sequence import Sequence

#: a long prompt is worked off so many rows at a time
ROWS = 64


def logprobs(logits: Tensor, ids: Many[int], top: int) -> list[Logprob]:
    """For each row of logits [R, V] that of its token ids[r], and of the `top` most probable."""
    out: list[Logprob] = []
    for start in range(0, len(ids), ROWS):
        some = torch.log_softmax(logits[start : start + ROWS].float().cpu(), dim=-1)
        mine = some.gather(1, torch.tensor(ids[start : start + ROWS])[:, None])
        ranks = (some > mine).sum(dim=1) + 1
        best, tokens = some.topk(min(top, some.shape[1]))
        rows = (ranks.tolist(), mine[:, 0].tolist(), tokens.tolist(), best.tolist())
        out += [
            Logprob(id, logprob, rank, tuple(zip(others, theirs, strict=True)))
            for id, rank, logprob, others, theirs in zip(
                ids[start : start + ROWS], *rows, strict=True
            )
        ]
    return out


def of_drawn(
    logits: Tensor, tokens: Many[int | Exception], batch: Many[Sequence]
) -> list[Logprob | None]:
    """Of what was drawn from each row of logits [B, V], for the sequences that ask for it."""
    out: list[Logprob | None] = []
    for row, (token, sequence) in enumerate(zip(tokens, batch, strict=True)):
        top = sequence.request.sampling.logprobs
        told = top is not None and isinstance(token, int)
        out += logprobs(logits[row : row + 1], [token], top) if told else [None]  # type: ignore[list-item, arg-type]
    return out


def read_prompt(one: Sequence, logits: Tensor) -> None:
    """Give a prompt that asks for it its tokens' logprobs; before `advance`.

    logits [n, V] after the last n of the scheduled tokens: each tells of the token that follows.
    """
    top = one.request.sampling.prompt_logprobs
    assert top is not None
    first = one.computed + one.scheduled - len(logits)
    after = one.ids[first + 1 : min(first + 1 + len(logits), one.prompt_tokens)]
    one.prompt_logprobs += logprobs(logits[: len(after)], after, top)
    one.wanted_from = first + len(after)
    if one.wanted_from >= one.prompt_tokens - 1:
        one.wanted_from = None  # all told: from here on only what is drawn counts
