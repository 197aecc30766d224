"""What is read from the hidden states where nothing is to be drawn: likelihoods and embeddings.

A sequence that reads goes through scheduler and runner like any other, in the same steps as chats;
after each pass `read` lets it take what it wants. Logits never stand whole: `ROWS` of them at a time
become the few numbers that were asked for.

Shapes: T tokens of the batch, R rows with targets, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from herdbook.engine.request import Reply, Request
from herdbook.errors import RequestError
from herdbook.model.decoder import Decoder

if TYPE_CHECKING:
    from herdbook.engine.sequence import Sequence

#: rows of logits at once: [ROWS, V] float32 is 25 MB where V is 49,152
ROWS = 128


class Likelihoods:
    """After each of the last tokens of a request: what given tokens' log-likelihoods are (nats), and
    which token is the likeliest."""

    def __init__(self, targets: Many[Many[int]], tokens: int) -> None:
        self.first = tokens - len(targets)
        self.targets = targets
        self.logprobs: list[dict[int, float]] = [{} for _ in targets]
        self.best = [-1] * len(targets)

    @property
    def error(self) -> Exception | None:
        if any(math.isnan(value) for row in self.logprobs for value in row.values()):
            return ArithmeticError("the model's logits are not finite")
        return None


class Pooled:
    """The mean of the hidden states of all tokens, after the final norm."""

    first = 0
    error: Exception | None = None

    def __init__(self, tokens: int, front: int) -> None:
        self.tokens, self.front = tokens - front, front  # the first ones are virtual
        self._sum: Tensor | None = None

    def add(self, hidden: Tensor, start: int) -> None:
        """The next tokens' [n, hidden]; from the beginning again after a preemption."""
        more = hidden[max(0, self.front - start) :].float().sum(0)
        self._sum = more if self._sum is None or not start else self._sum + more

    @property
    def mean(self) -> Tensor:
        """float32 [hidden]."""
        assert self._sum is not None, "asked before it was computed"
        return self._sum / self.tokens


Reading: TypeAlias = Likelihoods | Pooled
Through: TypeAlias = Callable[[Tensor], Tensor]


def reading_for(request: Request, decoder: Decoder, front: int = 0) -> Reading | None:
    """What a request reads; None where it has tokens drawn. Refuses what the model cannot give.

    front: so many of its tokens, the first ones, are virtual."""
    if request.embed:
        if decoder.whole_prompts:
            raise RequestError(
                f"an embedding by a {decoder.family} model",
                rule="is not one: it reads a prompt and its reply in different ways",
                next="embed with a decoder such as smollm2",
            )
        return Pooled(len(request.ids), front)
    decoder.need_head()
    if not request.targets:
        return None
    assert len(request.targets) <= len(request.ids)
    return Likelihoods(request.targets, len(request.ids))


def embedding(reply: Reply) -> Tensor:
    """What a request with `embed` asked for: float32 [hidden], on the CPU."""
    assert isinstance(reply.reading, Pooled)
    return reply.reading.mean.cpu()


def read(batch: Many[Sequence], hidden: Tensor, finish: Through, logits: Through) -> None:
    """Each sequence of the batch that reads takes its part of hidden [T, hidden].

    finish: rows of it → the final hidden states. logits: rows of it → float32 [R, V].
    """
    rows: list[int] = []
    takers: list[tuple[Likelihoods, int]] = []
    at = 0
    for one in batch:
        reading, end = one.reading, one.computed + one.scheduled
        if isinstance(reading, Pooled):
            reading.add(finish(hidden[at : at + one.scheduled]), one.computed)
        elif reading is not None:
            places = range(max(one.computed, reading.first), end)
            rows += [at + place - one.computed for place in places]
            takers += [(reading, place - reading.first) for place in places]
        at += one.scheduled
    for start in range(0, len(rows), ROWS):
        some = torch.tensor(rows[start : start + ROWS], device=hidden.device)
        _take(logits(hidden[some]), takers[start : start + ROWS])


def _take(logits: Tensor, takers: Many[tuple[Likelihoods, int]]) -> None:
    """logits float32 [R, V]; the taker of each row and which of its rows it is."""
    wanted = [
        (row, token) for row, (reading, n) in enumerate(takers) for token in reading.targets[n]
    ]
    row, token = torch.tensor(wanted, device=logits.device).T
    values = (logits[row, token] - logits.logsumexp(-1)[row]).tolist()
    for (at, one), value in zip(wanted, values, strict=True):
        reading, n = takers[at]
        reading.logprobs[n][one] = value
    for (reading, n), best in zip(takers, logits.argmax(-1).tolist(), strict=True):
        reading.best[n] = best
