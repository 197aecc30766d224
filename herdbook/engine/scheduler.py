"""The scheduler: which tokens of which sequences the next step computes.

One number per sequence, `scheduled`, unifies prefill in chunks and decoding. A step has room for
`max_batch_tokens` tokens and fills it in this order:

1. every running sequence that needs one token more (decoding);
2. running sequences in the middle of their prompt, a chunk each, the most urgent first;
3. waiting sequences, the most urgent first, as long as there are tokens and pages.

The most urgent is the one with the lowest `Request.priority`; among equals, the first to come. An
urgent request is admitted before others and computes its prompt before them, but it does not
interrupt who runs already: they go on decoding in every step.

Neither starves: no more sequences run than a step has tokens, so while one is in its prompt, at
most `max_batch_tokens - 1` others can decode, and at least one token of the budget is left for it.

A sequence gets the pages of its whole prompt when it is admitted and one page at a time while it
decodes. When none is left, the least urgent that runs is preempted (among equals the last to come): it
gives its pages back and waits for its turn again, its prompt now being all its tokens (most of which
it finds again in the cache). The most urgent can always go on, since alone it fits (checked at
submit): so every request ends, unless more urgent ones keep coming for ever.

The context of a prefix model's prompt is never cut: a step that begins one computes it all, more
tokens than `max_batch_tokens` if it must. Drafts (speculation.py) get what a step has left, and never
a page that someone would have to be preempted for.
"""

from __future__ import annotations

import itertools
from bisect import insort
from operator import attrgetter

from herdbook.engine.pages import PagePool
from herdbook.engine.sequence import Sequence

#: the order of urgency
TURN = attrgetter("turn")


class Scheduler:
    """share: pages hold what they say, so a later prompt that begins alike can use them."""

    def __init__(self, pool: PagePool, max_batch_tokens: int, *, share: bool = True) -> None:
        assert max_batch_tokens > 0
        self.pool, self.max_batch_tokens, self.share = pool, max_batch_tokens, share
        self.waiting: list[Sequence] = []  # both with the most urgent first
        self.running: list[Sequence] = []
        self._numbers = itertools.count(1)
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        sequence.turn = (sequence.request.priority, next(self._numbers))
        insort(self.waiting, sequence, key=TURN)

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: its pages are free (and stay known) from now on."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._give_back(sequence)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, with `scheduled` set; empty when nothing is to be done."""
        budget = self.max_batch_tokens
        batch: list[Sequence] = []
        preemptions = self.preemptions
        for sequence in self.running:
            sequence.scheduled = 0
        for sequence in list(self.running):
            if sequence.pages and sequence.remaining == 1 and self._next_page(sequence):
                sequence.scheduled = 1
                batch.append(sequence)
        budget -= len(batch)
        assert budget >= 0
        for sequence in self.running:
            if budget > 0 and not sequence.scheduled:
                budget -= self._schedule(sequence, budget, batch)
        if preemptions == self.preemptions:
            self._admit(budget, batch)
        return batch

    def advance(self, batch: list[Sequence]) -> None:
        """After the step: the scheduled tokens are computed, full pages become known."""
        for sequence in batch:
            self.progress(sequence, sequence.scheduled)

    def progress(self, sequence: Sequence, tokens: int) -> None:
        """So many more of the sequence's tokens have their keys and values in its pages."""
        size = self.pool.page_tokens
        sequence.computed += tokens
        full = sequence.computed // size
        if self.share and full > sequence.registered:
            keys = sequence.hash_pages(size)
            for i in range(sequence.registered, full):
                known = sequence.ids[i * size : (i + 1) * size]
                self.pool.register(sequence.pages[i], keys[i], known)
            sequence.registered = full

    def extend(self, sequence: Sequence, tokens: int) -> int:
        """See that up to so many drafts have pages; for how many there is room."""
        pool, length = self.pool, len(sequence.ids)
        wanted = pool.pages_for(length + tokens) - len(sequence.pages)
        sequence.pages += pool.allocate(max(0, min(wanted, pool.free)))
        return min(tokens, len(sequence.pages) * pool.page_tokens - length)

    def trim(self, sequence: Sequence) -> None:
        """Give back the pages that only wrong drafts needed."""
        need = self.pool.pages_for(len(sequence.ids))
        self.pool.release(sequence.pages[need:])
        del sequence.pages[need:]

    def _schedule(self, sequence: Sequence, budget: int, batch: list[Sequence]) -> int:
        sequence.scheduled = max(min(sequence.remaining, budget), sequence.together)
        batch.append(sequence)
        return sequence.scheduled

    def _admit(self, budget: int, batch: list[Sequence]) -> None:
        size = self.pool.page_tokens
        promised = {key for one in self.running for key in one.keys[one.registered :]}
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) == self.max_batch_tokens:
                break
            keys = sequence.hash_pages(size)[: sequence.unread // size] if self.share else []
            hits = self.pool.match(keys, sequence.ids)
            if len(hits) < len(keys) and keys[len(hits)] in promised:
                continue  # someone is computing that very page: share it when it is ready
            need = self.pool.pages_for(len(sequence.ids)) - len(hits)
            # One page stays spare for each that runs, lest they preempt the newcomer at once.
            if self.running and need + len(self.running) > self.pool.free_after(hits):
                break
            self.pool.hold(hits)
            sequence.pages = hits + self.pool.allocate(need)
            sequence.registered = len(hits)
            sequence.computed = len(hits) * size
            if sequence.cached_tokens is None:
                sequence.cached_tokens = sequence.computed
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=TURN)
            promised.update(sequence.keys[len(hits) :])
            budget -= self._schedule(sequence, budget, batch)

    def _next_page(self, sequence: Sequence) -> bool:
        """See that the sequence's next token has a page; False when it had to give up its own."""
        while len(sequence.pages) < self.pool.pages_for(len(sequence.ids)):
            if self.pool.free:
                sequence.pages += self.pool.allocate(1)
            else:
                victim = self.running.pop()
                self._give_back(victim)
                insort(self.waiting, victim, key=TURN)
                self.preemptions += 1
                if victim is sequence:
                    return False
        return True

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.state = {}
        sequence.computed = sequence.scheduled = sequence.registered = 0
