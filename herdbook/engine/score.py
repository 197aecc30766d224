"""How likely continuations of a prompt are, and each token of them: what multiple choice, ranking and
perplexity ask.

    ids    Q Q Q Q │ the  cat        two continuations, "the cat sat" and "the dog":
    rows         1    2    3         1 → the · 2 → cat and dog · 3 → sat

A row of logits after some tokens answers for every token that may follow them. So continuations that
begin alike are computed once up to where they part, and their last tokens never: four choices of one
token are one row after the prompt. What is left is a few sequences, each `Request` one path; prompts
that begin alike share pages in the engine's cache, within a call and with whatever ran before.

>>> part = Scoring([5, 6], [[1, 2, 3], [1, 4], [7]])
>>> [(list(one.ids), one.targets) for one in part.requests]
[([5, 6, 1, 2], ((1, 7), (2, 4), (3,)))]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from herdbook.engine.reading import Likelihoods
from herdbook.engine.request import Reply, Request
from herdbook.errors import RequestError

if TYPE_CHECKING:
    from herdbook.engine.engine import Engine

#: requests of a score_many that wait or run at once: the scheduler looks at all that wait
AT_ONCE = 256


@dataclass(frozen=True)
class Score:
    """One continuation: log-likelihood (nats) of each token, given the prompt and those before it.

    greedy: whether each token is the likeliest one, so that greedy decoding would write just this.
    """

    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def tokens(self) -> int:
        return len(self.logprobs)


class Scoring:
    """The requests that continuations of one prompt need, and their scores out of the replies."""

    def __init__(
        self,
        prompt: Sequence[int],
        continuations: Sequence[Sequence[int]],
        adapter: str | None = None,
    ) -> None:
        self.continuations = continuations
        #: the tree of continuations: of each node, the node behind each token that may follow
        tree: list[dict[int, int]] = [{}]
        self._paths: list[list[int]] = []  # the nodes before each token of a continuation
        for number, continuation in enumerate(continuations):
            if not len(continuation):
                raise RequestError(
                    f"continuation {number} of {len(continuations)}",
                    rule="is empty, so it has no likelihood",
                    next="leave it out, or score the prompt's last tokens as a continuation",
                )
            node, path = 0, []
            for token in continuation:
                path.append(node)
                node = tree[node].setdefault(token, len(tree))
                if node == len(tree):
                    tree.append({})
            self._paths.append(path)
        self.requests: list[Request] = []
        self._rows: dict[int, tuple[int, int]] = {}  # node → (which request, which of its rows)
        # Backwards, so that what goes on comes before what it begins with.
        stems = [list(one[:-1]) for one in continuations]
        for number in sorted(range(len(stems)), key=stems.__getitem__, reverse=True):
            new = [node for node in self._paths[number] if node not in self._rows]
            if new:
                for row, node in enumerate(new):
                    self._rows[node] = len(self.requests), row
                targets = tuple(tuple(tree[node]) for node in new)
                ids = [*prompt, *stems[number]]
                self.requests.append(Request(ids, targets=targets, adapter=adapter))

    def scores(self, replies: Sequence[Reply]) -> list[Score]:
        """Of each continuation; `replies` to `requests`, in their order."""
        found = []
        for continuation, path in zip(self.continuations, self._paths, strict=True):
            logprobs, greedy = [], True
            for node, token in zip(path, continuation, strict=True):
                request, row = self._rows[node]
                reading = replies[request].reading
                assert isinstance(reading, Likelihoods)
                logprobs.append(reading.logprobs[row][token])
                greedy &= reading.best[row] == token
            found.append(Score(tuple(logprobs), greedy))
        return found


def score_many(
    engine: Engine,
    asked: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    adapter: str | None = None,
) -> list[list[Score]]:
    """Engine.score_many. Everything is checked before anything is computed."""
    parts = []
    for prompt, continuations in asked:
        for continuation in continuations:
            engine.intake.check_ids(continuation, engine.intake.vocab)
        read = engine.model.prompt(prompt) if len(prompt) else []
        parts.append(Scoring(read, continuations, adapter))
    requests = [one for part in parts for one in part.requests]
    for one in requests:
        engine.intake.sequence(one)
    requests.sort(key=lambda one: list(one.ids))  # neighbours share most of their pages
    replies: dict[str, Reply] = {}
    for start in range(0, len(requests), AT_ONCE):
        some = requests[start : start + AT_ONCE]
        replies |= zip((one.id for one in some), engine.generate(some), strict=True)
    return [part.scores([replies[one.id] for one in part.requests]) for part in parts]
