"""Speculative decoding: guess the next tokens, check them in one step, keep those that were right.

A step that computes one token of one sequence mostly waits for the weights; a few tokens more cost
little. So a sequence may go into a step with its last token and k drafts behind it. Its k + 1 rows of
logits tell what follows each of them, and the engine reads them in order: the request's own chooser
draws a token from the first row; if that is the first draft, the second row is what decoding would
have come to next, and so on until token and draft differ or the reply ends. That last token is kept
too: a step adds 1 to k + 1 tokens. Slots of wrong drafts are overwritten later, pages that only they
needed go back at once, and no page is known by a hash that covers one.

What is guaranteed: every token is drawn by the same rule, with the same penalties and the same random
numbers, as without drafts. So equal logits give equal replies, greedy or with a seed, whatever was
guessed and whenever. Logits are equal to the last bit where the native step computes them; in PyTorch
up to the rounding of a product of k + 1 rows instead of one, as between batches of different sizes.
That can tip a token whose two best logits differ by no more.

How this is the rejection rule of Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv
2302.01318): a draft x that is a guess without probabilities is accepted with p(x), and otherwise the
token comes from p without x, renormalised; one draw from p does just that. A draft model has
probabilities q. Their rule accepts with 1 - TV(p, q), but what it draws depends on whether there was a
draft, which the other chats and the clock decide. Here draft and target draw with the same random
numbers instead (Daliri, Musco, Suresh 2024, arXiv 2408.07978): the distribution is p, the token does
not depend on the drafts, and they agree with at least (1 - TV) / (1 + TV). `sampling.race` draws
argmax p_i / e_i, which is the draw that they describe.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from copy import copy
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from herdbook.engine.runner import Runner
from herdbook.engine.sampling import choose
from herdbook.engine.scheduler import Scheduler
from herdbook.engine.sequence import Sequence
from herdbook.errors import ConfigError
from herdbook.model.interface import Model

#: drafts fill a step up to so many tokens; more chats than half of that, and nothing is guessed
ROWS = 16
#: a request whose drafts do not pay is tried again after so many steps, with so many drafts
PROBE, PROBE_DRAFTS = 16, 2
#: the longest and the shortest run of tokens that is looked up
LONGEST, SHORTEST = 4, 2
#: how much the newest acceptance counts, and how much older timings still do
NEWEST, OLDER = 0.2, 0.95


@dataclass
class Trial:
    """A sequence's rows of one step: `row` is the one to draw from next, `drafts` what was guessed."""

    sequence: Sequence
    row: int
    drafts: list[int]
    accepted: int = 0

    def right(self, token: int) -> bool:
        """Whether the token just drawn is the draft whose row comes next."""
        if self.drafts[self.accepted : self.accepted + 1] != [token]:
            return False
        self.accepted += 1
        self.row += 1
        return True


@dataclass
class Ask:
    """Up to `tokens` drafts are wanted for a sequence."""

    sequence: Sequence
    tokens: int


class Source(Protocol):
    """Where drafts come from."""

    def guess(self, asked: Many[Ask]) -> list[list[int]]:
        """For each as many drafts as there are good ones, perhaps none."""
        ...

    def learn(self, trial: Trial) -> None:
        """How much of it was right; the accepted tokens are in the sequence's ids by now."""
        ...


class Lookup:
    """Drafts from the sequence itself: what followed the last time its latest tokens stood there."""

    def __init__(self) -> None:
        #: of each sequence: run of tokens → the place after it; so many of its tokens were read
        self._read: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()
        self._after: WeakKeyDictionary[Sequence, dict[tuple[int, ...], int]] = WeakKeyDictionary()

    def guess(self, asked: Many[Ask]) -> list[list[int]]:
        return [self._one(ask.sequence, ask.tokens) for ask in asked]

    def _one(self, sequence: Sequence, tokens: int) -> list[int]:
        ids = sequence.ids
        after = self._after.setdefault(sequence, {})
        sizes = range(LONGEST, SHORTEST - 1, -1)
        for end in range(self._read.get(sequence, SHORTEST), len(ids)):
            for size in sizes:
                if size <= end:
                    after[tuple(ids[end - size : end])] = end
        self._read[sequence] = len(ids)
        for size in sizes:
            if place := after.get(tuple(ids[-size:]), 0):
                # what repeats with a period shorter than the drafts goes round in them, too
                period = len(ids) - place
                return [ids[place + i % period] for i in range(tokens)]
        return []

    def learn(self, trial: Trial) -> None:
        """Tokens are read when drafts are next asked for."""


class DraftModel:
    """Drafts from a smaller decoder with the same vocabulary.

    It keeps its keys and values in a cache of its own under the page numbers of the sequences, so a
    prefix that a page shares is shared here too. `_held` says of how many tokens of a page, and in
    which of its allocations, it has them. What is missing it computes before it guesses: a prompt, in
    chunks of `max_batch_tokens`, in steps of their own.
    """

    def __init__(self, model: Model, scheduler: Scheduler) -> None:
        self.scheduler, self.pool = scheduler, scheduler.pool
        self.context = model.config.max_pos
        self.runner = Runner(model, self.pool.pages, self.pool.page_tokens)
        self._held: dict[int, tuple[int, int]] = {}  # page → allocation, tokens

    def guess(self, asked: Many[Ask]) -> list[list[int]]:
        shadows = [self._shadow(ask.sequence) for ask in asked]
        if any(shadow.remaining > ROWS for shadow in shadows):
            self._read([shadow for shadow in shadows if shadow.remaining > ROWS])
            return [[] for _ in asked]
        guesses: list[list[int]] = []
        going: list[tuple[Sequence, int]] = []  # and up to where its ids go
        for ask, shadow in zip(asked, shadows, strict=True):
            room = min(ask.tokens, self.context - len(shadow.ids))
            if room > 0 and (room := self.scheduler.extend(ask.sequence, room)):
                going.append((shadow, len(shadow.ids) + room))
                self._hold(ask.sequence, shadow.computed, len(shadow.ids))
        while going:
            logits = self.runner.run([shadow for shadow, _ in going])
            assert logits is not None
            chosen = choose(logits, [shadow.chooser for shadow, _ in going])
            drawn = zip(going, chosen, strict=True)
            going = [one for one, token in drawn if isinstance(token, int) and more(*one, token)]
        for ask, shadow in zip(asked, shadows, strict=True):
            guesses.append(shadow.ids[len(ask.sequence.ids) :])
        return guesses

    def _shadow(self, sequence: Sequence) -> Sequence:
        """The sequence as this model sees it: what it has read of it, and its own next tokens."""
        shadow = copy(sequence)  # the list of pages is the same
        shadow.adapter = shadow.soft = None  # which are of the other model
        shadow.ids, shadow.chooser = list(sequence.ids), sequence.chooser.fork()
        shadow.computed = self._computed(sequence)
        shadow.scheduled = shadow.remaining
        return shadow

    def _read(self, shadows: Many[Sequence]) -> None:
        """Go on reading prompts, as far as the tokens of one step go."""
        budget = self.scheduler.max_batch_tokens
        for shadow in shadows:
            shadow.scheduled = min(shadow.remaining, budget)
            budget -= shadow.scheduled
        reading = [shadow for shadow in shadows if shadow.scheduled]
        self.runner.run(reading)
        for shadow in reading:
            self._hold(shadow, shadow.computed, shadow.computed + shadow.scheduled)

    def learn(self, trial: Trial) -> None:
        """The keys of accepted drafts are right; those of the last one were not computed."""
        if trial.drafts and trial.sequence.pages:
            end = trial.sequence.computed - (trial.accepted == len(trial.drafts))
            self._hold(trial.sequence, end - trial.accepted, end)

    def _computed(self, sequence: Sequence) -> int:
        """So many of the sequence's tokens this model has read; the last one is always to be read."""
        computed = 0
        for page in sequence.pages:
            allocation, tokens = self._held.get(page, (0, 0))
            if allocation != self.pool.allocations[page]:
                break
            computed += tokens
            if tokens < self.pool.page_tokens:
                break
        return min(computed, len(sequence.ids) - 1)

    def _hold(self, sequence: Sequence, start: int, end: int) -> None:
        size = self.pool.page_tokens
        for i in range(start // size, self.pool.pages_for(end)):
            page = sequence.pages[i]
            self._held[page] = self.pool.allocations[page], min(size, end - i * size)


def more(shadow: Sequence, end: int, token: int) -> bool:
    """Take a draft; whether another one is wanted."""
    shadow.ids.append(token)
    shadow.chooser.took(token)
    shadow.computed += shadow.scheduled
    shadow.scheduled = 1
    return len(shadow.ids) < end


@dataclass
class _Record:
    """How well a request's drafts do. rate: accepted of drafted, the latest counting most."""

    rate: float = 1.0
    tokens: int = 4  # drafts of the next trial
    skipped: int = 0


class Costs:
    """Seconds of a step as base + row · rows: least squares over the latest steps."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5
        self.draft = 0.0  # seconds that a draft takes to be made

    def add(self, rows: int, seconds: float) -> None:
        new = (1, rows, seconds, rows * rows, rows * seconds)
        self._sums = [OLDER * old + one for old, one in zip(self._sums, new, strict=True)]

    def drafted(self, tokens: int, seconds: float) -> None:
        each = seconds / tokens
        self.draft = each if not self.draft else self.draft + NEWEST * (each - self.draft)

    def break_even(self, rows: int) -> float:
        """The acceptance rate from which on a draft more in a step of `rows` tokens pays.

        A draft costs a row and its making, and is worth what a step costs per token:
        rate · (base + row · rows) / rows > row + draft.
        """
        n, r, t, rr, rt = self._sums
        spread = n * rr - r * r
        if spread < 1e-6:
            return 0.0  # nothing to compare yet: try
        row = min(max(0.0, (n * rt - r * t) / spread), t / r)
        step = (t - row * r) / n + row * rows
        return rows * (row + self.draft) / step


class Speculation:
    """Decides who gets how many drafts, and learns from what became of them."""

    def __init__(self, source: Source, scheduler: Scheduler) -> None:
        self.source, self.scheduler, self.costs = source, scheduler, Costs()
        self.drafted = self.accepted = 0
        self._records: WeakKeyDictionary[Sequence, _Record] = WeakKeyDictionary()

    def draft(self, batch: Many[Sequence]) -> None:
        """Put drafts behind the tokens of a batch that decodes, where that pays."""
        most = min(ROWS, self.scheduler.max_batch_tokens) // len(batch) - 1
        if most < 1:
            return
        asked: list[Ask] = []
        for sequence in batch:
            # of a reply that may have n tokens more, n - 1 are worth a guess
            worth = min(most, sequence.limit - sequence.reply_tokens - 1)
            tokens = min(worth, self._wished(sequence, len(batch)))
            if tokens > 0 and sequence.draws and sequence.computed:
                asked.append(Ask(sequence, tokens))
        begun = time.perf_counter()
        guesses = self.source.guess(asked) if asked else []
        seconds = time.perf_counter() - begun
        if made := sum(map(len, guesses)):
            self.costs.drafted(made, seconds)
        for ask, drafts in zip(asked, guesses, strict=True):
            ask.sequence.try_out(drafts[: self.scheduler.extend(ask.sequence, len(drafts))])

    def _wished(self, sequence: Sequence, rows: int) -> int:
        record = self._records.setdefault(sequence, _Record())
        if self.pays(record.rate, rows):
            return record.tokens
        record.skipped += 1
        return PROBE_DRAFTS if record.skipped % PROBE == 0 else 0

    def pays(self, rate: float, rows: int) -> bool:
        return rate > self.costs.break_even(rows)

    def learn(self, trials: Many[Trial], seconds: float) -> None:
        """What became of a step that decoded, and how long it took without the making of drafts."""
        rows = sum(1 + len(trial.drafts) for trial in trials)
        if rows <= ROWS:
            self.costs.add(rows, seconds)
        for trial in trials:
            self.source.learn(trial)
            if not trial.drafts:
                continue
            if trial.sequence.pages:
                self.scheduler.trim(trial.sequence)
            drafted, accepted = len(trial.drafts), trial.accepted
            self.drafted += drafted
            self.accepted += accepted
            record = self._records[trial.sequence]
            record.rate += NEWEST * (accepted / drafted - record.rate)
            # as long as all were right twice as many, else one more than were right
            record.tokens = min(2 * drafted, ROWS - 1) if accepted == drafted else accepted + 1


def speculation(
    speculate: str | None, draft: Model | None, model: Model, scheduler: Scheduler
) -> Speculation | None:
    """What an engine's settings ask for. ConfigError: it cannot be had with this model."""
    if speculate is None and draft is None:
        return None
    asked = f"speculate={speculate!r}" if speculate else "draft"
    if speculate is not None and draft is not None:
        raise ConfigError(
            "speculate and draft", rule="are two sources of drafts", next="give one of them"
        )
    if speculate not in (None, "ngram"):
        raise ConfigError(asked, rule="is not known", next='write "ngram", or give a draft model')
    if model.memory != "pages":
        raise ConfigError(
            asked,
            rule="needs a model whose cache can forget tokens; this one keeps a state",
            next="leave it out",
        )
    if draft is None:
        return Speculation(Lookup(), scheduler)
    draft.need_head()
    if draft.memory != "pages" or draft.config.prefix or model.config.prefix:
        raise ConfigError(
            "draft",
            rule="works only where both models read a prompt token by token",
            next='leave it out, or take speculate="ngram"',
        )
    if draft.config.vocab != model.config.vocab or draft.ids != model.ids:
        raise ConfigError(
            f"a draft model of {draft.config.vocab} tokens",
            rule=f"has another vocabulary than the model's {model.config.vocab}",
            next="take a smaller model of the same family, with the same tokenizer",
        )
    return Speculation(DraftModel(draft, scheduler), scheduler)
