"""Choosing the next token from the logits of a batch.

Shapes: B sequences, V tokens of the vocabulary. Logits are float32 on the CPU.

A row that samples goes through, in this order (Hugging Face's; penalties as in vLLM and OpenAI):

0. logit_bias is added; what may not be drawn falls to -inf: a stop token before min_tokens, what the
   grammar does not allow
1. repetition penalty over the tokens of prompt and reply: logit / r where positive, × r where not
2. frequency and presence penalties over the tokens of the reply: − f × count − p × (count > 0)
3. temperature: logits / t
4. top-k, then top-p on what is left (renormalised), then min-p on what is left
5. one draw with the request's own generator: the first to come in an exponential race

A row's draw depends on its own logits, its own settings and its own generator alone. So what a seed
promises is: the same logits give the same tokens, whoever else is in the batch, streamed or not. That
the logits are the same is the runner's part.

Rows that change no logits, at temperature 0, take one argmax over the whole batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy, deepcopy

import numpy as np

from herdbook.engine.grammar import Matcher
from herdbook.engine.request import Sampling

#: top-p looks at this many of the most probable tokens before it sorts the whole vocabulary
HEAD = 1024


class Chooser:
    """The sampling state of one request: its generator and the counts for its penalties.

    ends: the tokens that end the reply; none is drawn before `min_tokens`. matcher: the way through
    the request's grammar.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab: int,
        ends: Collection[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.sampling = sampling
        self.generator: np.random.Generator | None = None
        if sampling.temperature > 0:
            self.generator = np.random.default_rng(sampling.seed)
        self.drawn = 0
        self.ends, self.matcher = frozenset(ends), matcher
        self.late = _long([id for id in ends if id < vocab]) if sampling.min_tokens else None
        self.biased = _long([id for id, _ in sampling.logit_bias])
        self.bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self.seen: np.ndarray | None = None  # [V] bool: in prompt or reply
        self.counts: np.ndarray | None = None  # [V]: occurrences in the reply
        if sampling.penalised:
            self.counts = np.zeros(vocab, np.float32)
            self.seen = np.zeros(vocab, bool)
            self.seen[_long(prompt)] = True

    @property
    def greedy(self) -> bool:
        """Nothing but argmax."""
        changed = self.counts is not None or self.late is not None or len(self.biased)
        return self.generator is None and self.matcher is None and not changed

    @property
    def complete(self) -> bool:
        """The reply is all that its grammar allows."""
        return self.matcher is not None and self.matcher.complete

    def fork(self) -> Chooser:
        """A twin that draws with the same random numbers from here on; neither changes the other."""
        twin = copy(self)
        if self.generator is not None:
            twin.generator = deepcopy(self.generator)
        if self.counts is not None and self.seen is not None:
            twin.counts, twin.seen = self.counts.copy(), self.seen.copy()
        if self.matcher is not None:
            twin.matcher = self.matcher.fork()
        return twin

    def took(self, token: int) -> None:
        self.drawn += 1
        if self.matcher is not None:
            self.matcher.took(token)
        if self.counts is not None and self.seen is not None:
            self.counts[token] += 1
            self.seen[token] = True

    def steer(self, logits: np.ndarray) -> np.ndarray:
        """Logits [V] with the bias, and -inf where nothing may be drawn."""
        late = self.late if self.drawn < self.sampling.min_tokens else None
        if not len(self.biased) and late is None and self.matcher is None:
            return logits
        logits = logits.copy()
        if len(self.biased):
            np.add.at(logits, self.biased, self.bias)
        if late is not None:
            logits[late] = -np.inf
        if self.matcher is not None:
            logits[~self.matcher.allowed()] = -np.inf
        return logits

    def penalise(self, logits: np.ndarray) -> np.ndarray:
        """Logits [V] less what their tokens' earlier appearances cost."""
        s = self.sampling
        if self.counts is None or self.seen is None:
            return logits
        if s.repetition_penalty != 1.0:
            r = np.float32(s.repetition_penalty)
            lower = np.where(logits > 0, logits / r, logits * r)
            logits = np.where(self.seen, lower, logits)
        logits = logits - np.float32(s.frequency_penalty) * self.counts
        return logits - np.float32(s.presence_penalty) * (self.counts > 0)

    def choose(self, logits: np.ndarray) -> int:
        """The next token for logits [V] (float32, not changed)."""
        logits = self.penalise(self.steer(logits))
        if not np.isfinite(logits.max()):
            raise ArithmeticError("nothing is left that may be drawn")
        if self.generator is None:
            return int(logits.argmax())
        probabilities, tokens = candidates(logits, self.sampling)
        pick = race(probabilities, self.generator)
        return pick if tokens is None else int(tokens[pick])


def _long(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int64)


def race(probabilities: np.ndarray, generator: np.random.Generator) -> int:
    """A draw from unnormalised probabilities [n]: each candidate arrives after an exponential time
    of its own at the rate of its probability, and the first one is it.
    """
    times = generator.standard_exponential(len(probabilities), np.float32)
    times = np.maximum(times, np.finfo(np.float32).tiny)  # zero has been seen
    return int((probabilities / times).argmax())


def candidates(logits: np.ndarray, s: Sampling) -> tuple[np.ndarray, np.ndarray | None]:
    """What may be drawn from logits [V]: unnormalised probabilities [n] and their token ids [n].

    Ids are None where the whole vocabulary stands, in its own order. Otherwise the most probable
    come first, of equals the lower id.
    """
    # the likeliest at 0: a tiny temperature must not take the others beyond all numbers
    probabilities = np.exp((logits - logits.max()) / np.float32(max(s.temperature, 1e-6)))
    probabilities /= probabilities.sum()
    tokens: np.ndarray | None = None
    if 0 < s.top_k < len(logits):
        probabilities, tokens = greatest(probabilities, s.top_k)
        probabilities = probabilities / probabilities.sum()
    if s.top_p < 1.0:
        if tokens is None:
            # The nucleus is nearly always small: sort the head of the vocabulary, and all of it
            # only where that does not reach p.
            best, tokens = greatest(probabilities, HEAD)
            if float(best.sum()) < s.top_p:
                best, tokens = greatest(probabilities, len(probabilities))
            probabilities = best
        before = probabilities.cumsum() - probabilities
        keep = int((before < s.top_p).sum())  # the first always stays
        probabilities, tokens = probabilities[:keep], tokens[:keep]
    if s.min_p > 0:
        kept = probabilities >= np.float32(s.min_p) * probabilities.max()
        if tokens is None:
            tokens = np.arange(len(logits))
        probabilities, tokens = probabilities[kept], tokens[kept]
    return probabilities, tokens


def greatest(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` greatest of values [V] (or all), and where they stand: in falling order, of equals
    the first."""
    if not count:
        places = np.arange(0)
    elif count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        (places,) = np.nonzero(values >= least)
    else:
        places = np.arange(len(values))
    order = np.argsort(-values[places], kind="stable")[:count]
    return values[places[order]], places[order]


def choose(logits: np.ndarray, choosers: Sequence[Chooser]) -> list[int | Exception]:
    """One token for each row of logits [B, V], or the exception of the row that failed."""
    greedy = logits.argmax(-1)  # not-a-number counts as the greatest
    finite = np.isfinite(np.take_along_axis(logits, greedy[:, None], 1)[:, 0])
    chosen: list[int | Exception] = list(greedy.tolist())
    for row, chooser in enumerate(choosers):
        if not finite[row]:
            chosen[row] = ArithmeticError("the model's logits are not finite")
        elif not chooser.greedy:
            try:
                chosen[row] = chooser.choose(logits[row])
            except Exception as error:  # noqa: BLE001  one bad row must not end its batch-mates
                chosen[row] = error
    return chosen
