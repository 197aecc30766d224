"""What is read from a prompt's hidden states: likelihoods, embeddings, the prompt's own logprobs.

A sequence that reads goes through scheduler and runner like any other, in the same steps as chats;
after each pass `read` lets it take what it wants. Logits never stand whole: `ROWS` of them at a time
become the few numbers that were asked for. `rest` are the places after which a reading has still to
take something. It only ever shrinks from its front: what was taken is not taken again, whatever is
computed anew after a preemption, and what is before it may come out of known pages.

Shapes: T tokens of the batch, R rows with targets, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from herdbook.engine.logprobs import logprobs
from herdbook.engine.request import Logprob, Reply, Request
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
        self.rest = range(self.first, tokens)
        self.targets = targets
        self.logprobs: list[dict[int, float]] = [{} for _ in targets]
        self.best = [-1] * len(targets)

    def take(self, table: Tensor, best: Many[int]) -> None:
        """The next rows of log-probabilities [n, V], and the likeliest tokens of their logits."""
        start = self.rest.start - self.first
        targets = self.targets[start : start + len(table)]
        wanted = [(row, token) for row, some in enumerate(targets) for token in some]
        row, token = torch.tensor(wanted, dtype=torch.long, device=table.device).view(-1, 2).T
        for (at, one), value in zip(wanted, table[row, token].tolist(), strict=True):
            self.logprobs[start + at][one] = value
        self.best[start : start + len(table)] = best
        self.rest = self.rest[len(table) :]

    @property
    def error(self) -> Exception | None:
        return _unless_finite(value for row in self.logprobs for value in row.values())


class Pooled:
    """The mean of the hidden states of all tokens, after the final norm."""

    error: Exception | None = None

    def __init__(self, tokens: int, front: int) -> None:
        self.tokens, self.front = tokens - front, front  # the first ones are virtual
        self.rest = range(tokens)
        self._sum: Tensor | None = None

    def add(self, hidden: Tensor) -> None:
        """The next tokens' [n, hidden]."""
        more = hidden[max(0, self.front - self.rest.start) :].float().sum(0)
        self._sum = more if self._sum is None else self._sum + more
        self.rest = self.rest[len(hidden) :]

    @property
    def mean(self) -> Tensor:
        """float32 [hidden]."""
        assert self._sum is not None, "asked before it was computed"
        return self._sum / self.tokens


class PromptLogprobs:
    """Of each token of a prompt that is to be gone on from: how probable it was after those before."""

    def __init__(self, ids: Many[int], top: int, front: int) -> None:
        self.ids, self.top, self.front = ids, top, front  # so many virtual tokens stand before ids
        self.rest = range(front, front + len(ids) - 1)
        self.told: list[Logprob | None] = [None]  # nothing is before the first

    @property
    def error(self) -> Exception | None:
        return _unless_finite(one.logprob for one in self.told if one)

    def take(self, table: Tensor, best: Many[int]) -> None:
        """The next rows of log-probabilities [n, V]."""
        first = self.rest.start - self.front + 1
        self.told += logprobs(table, self.ids[first : first + len(table)], self.top)
        self.rest = self.rest[len(table) :]


def _unless_finite(logprobs: Iterable[float]) -> Exception | None:
    if any(map(math.isnan, logprobs)):
        return ArithmeticError("the model's logits are not finite")
    return None


Reading: TypeAlias = Likelihoods | Pooled | PromptLogprobs
Through: TypeAlias = Callable[[Tensor], Tensor]


def reading_for(request: Request, decoder: Decoder, front: int = 0) -> Likelihoods | Pooled | None:
    """What a request reads instead of drawing; None where it draws. Refuses what the model lacks.

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
    takers: list[Likelihoods | PromptLogprobs] = []  # of each row
    at = 0
    for one in batch:
        reading, first = one.reading, at - one.computed
        if reading is not None:
            start = max(one.computed, reading.rest.start)
            places = range(start, min(one.computed + one.scheduled, reading.rest.stop))
            if not isinstance(reading, Pooled):
                rows += [first + place for place in places]
                takers += [reading] * len(places)
            elif places:
                reading.add(finish(hidden[first + places.start : first + places.stop]))
        at += one.scheduled
    for begin in range(0, len(rows), ROWS):
        some = logits(hidden[torch.tensor(rows[begin : begin + ROWS], device=hidden.device)])
        table, best, end = some.float().log_softmax(-1), some.argmax(-1).tolist(), 0
        for reading, its in groupby(takers[begin : begin + ROWS]):
            row, end = end, end + len(list(its))
            reading.take(table[row:end], best[row:end])
