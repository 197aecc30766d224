"""A sequence: one request on its way through the engine.

Of its `ids` (prompt, then reply) the first `computed` have their keys and values in `pages`; the
next `scheduled` are computed in this step. Prefill in chunks, decoding, and the repair after a
preemption are then the same thing: `computed` runs after `len(ids)`, and each time it has caught
up, one more token is drawn.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from herdbook.engine.pages import chain, page_hash
from herdbook.engine.reading import PromptLogprobs, Reading
from herdbook.engine.request import Finish, Logprob, Reply, Request
from herdbook.engine.sampling import Chooser
from herdbook.engine.text import TextOut
from herdbook.model.prefix import Context

if TYPE_CHECKING:
    from herdbook.engine.corrections import Adapter
    from herdbook.model.carried import State
    from herdbook.model.soft import Soft


class Sequence:
    """The state of one request; the scheduler and the engine change it."""

    def __init__(
        self,
        request: Request,
        limit: int,
        chooser: Chooser,
        out: TextOut,
        context: Context | None = None,
        whole: bool = False,
        reading: Reading | None = None,
        adapter: Adapter | None = None,
        soft: Soft | None = None,
    ) -> None:
        self.request = request
        self.context = context  # of a prefix model's prompt; it is computed in one step
        self.whole = whole  # whatever waits to be computed is computed in one step
        self.reading = reading  # takes what it wants from the hidden states
        reads_on = reading is None or isinstance(reading, PromptLogprobs)
        self.draws = reads_on and not request.prompt_only
        self.adapter = adapter
        self.soft = soft  # its virtual tokens are the first `front` of the ids, and negative
        self.front = soft.tokens if soft else 0
        self.ids = list(request.ids)
        self.prompt_tokens = len(self.ids)
        self.limit = limit  # most tokens that the reply may have
        self.chooser, self.out = chooser, out
        self.pages: list[int] = []
        self.state: State = {}  # of a model that keeps its own instead of what is in pages
        self.keys: list[bytes] = []  # hashes of the full pages of `ids`
        self.computed = 0
        self.scheduled = 0
        self.logprobs: list[Logprob] = []  # of the reply, if asked for
        self.drafts: list[int] = []  # guesses that stand at the end of ids during a step
        self.registered = 0  # pages that the pool knows by hash (or knew before)
        self.cached_tokens: int | None = None  # at the first admission
        self.finish: Finish | None = None
        self.error: Exception | None = None
        self.turn = (request.priority, 0)  # the lower, the more urgent; `Scheduler.add` numbers it
        self.submitted_at = time.perf_counter()
        self.first_at = self.last_at = 0.0

    @property
    def remaining(self) -> int:
        """Tokens to compute until the next one can be drawn."""
        return len(self.ids) - self.computed

    @property
    def wanted(self) -> int:
        """After so many of the scheduled tokens, the last ones, logits are wanted to draw from."""
        return 1 + len(self.drafts) if self.draws and self.scheduled == self.remaining else 0

    @property
    def unread(self) -> int:
        """From this token on all are computed, even those whose page is known."""
        last = len(self.ids) - 1
        return min(last, self.reading.rest.start) if self.reading and self.reading.rest else last

    @property
    def prompt_logprobs(self) -> tuple[Logprob | None, ...] | None:
        """Those that are told by now; None where they were not asked for."""
        return tuple(self.reading.told) if isinstance(self.reading, PromptLogprobs) else None

    @property
    def together(self) -> int:
        """So many of the next tokens must be computed in one step: the rest of a prefix's context, or
        all."""
        if self.whole:
            return self.remaining
        return max(0, self.context.tokens - self.computed) if self.context else 0

    @property
    def reply_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    def hash_pages(self, page_tokens: int) -> list[bytes]:
        """Hashes of the full pages; only new ones are computed.

        In a context that sees itself whole, every page depends on all of it; under an adapter, on that.
        """
        if (len(self.keys) + 1) * page_tokens <= len(self.ids):
            whole = self.ids[: self.context.tokens] if self.context else []
            before = page_hash(b"", whole) if whole else b""
            before += self.adapter.key if self.adapter else b""
            self.keys = chain(self.ids, page_tokens, self.keys, before)
        return self.keys

    def try_out(self, drafts: list[int]) -> None:
        """Schedule these tokens, too, with logits after each, until `withdraw`."""
        self.drafts = drafts
        self.ids += drafts
        self.scheduled += len(drafts)

    def withdraw(self) -> list[int]:
        """Take the drafts back; what they are."""
        drafts, self.drafts = self.drafts, []
        if drafts:
            del self.ids[-len(drafts) :]
            self.scheduled -= len(drafts)
        return drafts

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at

    def reply(self) -> Reply:
        assert self.finish is not None
        return Reply(
            text=self.out.text,
            ids=tuple(self.ids[self.prompt_tokens :]),
            finish=self.finish,
            prompt_tokens=self.prompt_tokens - self.front,
            cached_tokens=max(0, (self.cached_tokens or 0) - self.front),
            waiting_s=(self.first_at or time.perf_counter()) - self.submitted_at,
            decoding_s=self.last_at - self.first_at,
            error=self.error,
            reading=None if self.draws else self.reading,
            logprobs=None if self.request.sampling.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
        )
