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
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from herdbook.engine.logprobs import log_softmax, logprobs
from herdbook.engine.request import Logprob, Reply, Request
from herdbook.errors import RequestError

if TYPE_CHECKING:
    from herdbook.engine.sequence import Sequence
    from herdbook.model.interface import Model

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

    def take(self, table: np.ndarray, best: Many[int]) -> None:
        """The next rows of log-probabilities [n, V], and the likeliest tokens of their logits."""
        start = self.rest.start - self.first
        targets = self.targets[start : start + len(table)]
        wanted = [(row, token) for row, some in enumerate(targets) for token in some]
        row, token = np.array(wanted, np.int64).reshape(-1, 2).T
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
        self._sum: np.ndarray | None = None

    def add(self, hidden: np.ndarray) -> None:
        """The next tokens' [n, hidden]."""
        more = hidden[max(0, self.front - self.rest.start) :].sum(0)
        self._sum = more if self._sum is None else self._sum + more
        self.rest = self.rest[len(hidden) :]

    @property
    def mean(self) -> np.ndarray:
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

    def take(self, table: np.ndarray, best: Many[int]) -> None:
        """The next rows of log-probabilities [n, V]."""
        first = self.rest.start - self.front + 1
        self.told += logprobs(table, self.ids[first : first + len(table)], self.top)
        self.rest = self.rest[len(table) :]


def _unless_finite(logprobs: Iterable[float]) -> Exception | None:
    if any(map(math.isnan, logprobs)):
        return ArithmeticError("the model's logits are not finite")
    return None


Reading: TypeAlias = Likelihoods | Pooled | PromptLogprobs
#: rows of what the runner computed (its own kind of array) → float32 [R, …]
Through: TypeAlias = Callable[[Any], np.ndarray]


def reading_for(request: Request, model: Model, front: int = 0) -> Likelihoods | Pooled | None:
    """What a request reads instead of drawing; None where it draws. Refuses what the model lacks.

    front: so many of its tokens, the first ones, are virtual."""
    if request.embed:
        if model.whole_prompts:
            raise RequestError(
                f"an embedding by a {model.family} model",
                rule="is not one: it reads a prompt and its reply in different ways",
                next="embed with a decoder such as smollm2",
            )
        return Pooled(len(request.ids), front)
    model.need_head()
    if not request.targets:
        return None
    assert len(request.targets) <= len(request.ids)
    return Likelihoods(request.targets, len(request.ids))


def embedding(reply: Reply) -> np.ndarray:
    """What a request with `embed` asked for: float32 [hidden]."""
    assert isinstance(reply.reading, Pooled)
    return reply.reading.mean


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each of vectors [..., hidden] at length 1; one of zeros stays so."""
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return found


def read(batch: Many[Sequence], hidden: Any, finish: Through, logits: Through) -> None:
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
        some = logits(hidden[rows[begin : begin + ROWS]])
        table, best, end = log_softmax(some), some.argmax(-1).tolist(), 0
        for reading, its in groupby(takers[begin : begin + ROWS]):
            row, end = end, end + len(list(its))
            reading.take(table[row:end], best[row:end])
