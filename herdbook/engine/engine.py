"""The engine: requests in, pieces of text out, one step at a time.

    engine = Engine(decoder, tokenizer)
    replies = engine.generate([Request(ids, Sampling(max_tokens=32)) for ids in prompts])

or, as the server does it, many at once and as they come:

    engine.submit(request)
    while engine.busy:
        for piece in engine.step():
            ...

An engine belongs to one thread.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from herdbook.engine.adapters import Adapters
from herdbook.engine.intake import Intake
from herdbook.engine.logprobs import of_drawn
from herdbook.engine.pages import PAGE_TOKENS, PagePool
from herdbook.engine.reading import embedding, unit
from herdbook.engine.request import Finish, Logprob, Piece, Reply, Request
from herdbook.engine.runner import Runner
from herdbook.engine.sampling import choose
from herdbook.engine.scheduler import Scheduler
from herdbook.engine.score import Score, score_many
from herdbook.engine.sequence import Sequence
from herdbook.engine.speculation import Trial, speculation
from herdbook.engine.store import cache_kind, cache_pages, token_bytes
from herdbook.errors import RequestError
from herdbook.model.interface import Model

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from herdbook.book.book import Artifact
    from herdbook.tokens.tokenizer import Tokenizer


class Engine:
    """Paged cache, continuous batching, prefix sharing, over one model.

    cache_bytes or pages: the size of the cache. cache_dtype: how it keeps its numbers, "float32",
    "bfloat16" or "int8" (a scale for each token and head); without it as the model computes, or, where
    that leaves too little room, in fewer bits. max_batch_tokens: the most tokens that one step
    computes; a longer prompt is computed in chunks, while others go on decoding.

    speculate="ngram" guesses the next tokens from the text so far, draft=a smaller model
    of the same vocabulary; several are then checked in one step, where that is faster. The replies
    are those of an engine without (what is guaranteed, and how far: engine/speculation.py).
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        *,
        page_tokens: int = PAGE_TOKENS,
        pages: int | None = None,
        cache_bytes: int | None = None,
        cache_dtype: str | torch.dtype | None = None,
        max_batch_tokens: int = 512,
        speculate: Literal["ngram"] | None = None,
        draft: Model | None = None,
    ) -> None:
        beside = 0 if draft is None else token_bytes(draft.config, draft.kind)
        kind = str(cache_dtype or cache_kind(model, cache_bytes, beside)).removeprefix("torch.")
        if pages is None:
            pages = cache_pages(model.config, kind, page_tokens, cache_bytes, beside, model.place)
        self.model, self.tokenizer = model, tokenizer
        self.adapters = Adapters(model)
        self.pool = PagePool(pages, page_tokens)
        self.intake = Intake(model, tokenizer, self.adapters, self.pool)
        share = model.memory == "pages"
        self.scheduler = Scheduler(self.pool, max_batch_tokens, share=share)
        self.runner = Runner(model, pages, page_tokens, kind)
        self.speculation = speculation(speculate, draft, model, self.scheduler)
        self._active: dict[str, Sequence] = {}
        self._backlog: list[Piece] = []  # what step() hands out next; no failure loses any of it
        self._totals = {
            "requests": 0,
            "steps": 0,
            "prompt_tokens": 0,
            "cached_tokens": 0,
            "completion_tokens": 0,
            "prefill_tokens": 0,
            "prefill_s": 0.0,
            "decode_tokens": 0,
            "decode_s": 0.0,
            "drafted_tokens": 0,
            "accepted_tokens": 0,
        }

    def forget(self) -> None:
        """Empty the cache: later replies depend on nothing that was asked before."""
        self.pool.forget()

    @property
    def busy(self) -> bool:
        """There is something to be had from step()."""
        return bool(self._active or self._backlog)

    @property
    def most_tokens(self) -> int:
        """The most tokens, prompt and reply together, that one request can have."""
        return self.intake.most_tokens

    def submit(self, request: Request) -> None:
        """Queue a request. One that can never be served is refused here, with the numbers."""
        if request.id in self._active:
            raise RequestError(
                f"request id {request.id!r}", rule="is already running", next="give another id"
            )
        sequence = self.intake.sequence(request)
        self._active[request.id] = sequence
        self.scheduler.add(sequence)
        self._totals["requests"] += 1

    def step(self) -> list[Piece]:
        """Compute one step; what it added to each request. [] when nothing is finished or running."""
        batch = self.scheduler.schedule()
        if not batch:
            assert not self._active, "requests wait, yet none was scheduled"
            return self._take_backlog()
        begun = time.perf_counter()
        tokens_computed = sum(one.scheduled for one in batch)
        # A step counts as prefill when any sequence computed more than one token.
        kind = "prefill" if tokens_computed > len(batch) else "decode"
        guess = self.speculation if kind == "decode" else None
        if guess is not None:
            guess.draft(batch)
        drafted = time.perf_counter()
        wanted = [one.wanted for one in batch]
        try:
            logits = self.runner.run(batch)
        finally:
            drafts = [one.withdraw() for one in batch]
        trials = [
            Trial(one, end - rows, some)
            for one, end, rows, some in zip(batch, accumulate(wanted), wanted, drafts, strict=True)
            if rows
        ]
        self.scheduler.advance(batch)
        if logits is not None:
            self._draw(logits, trials)
        for one in batch:
            if not one.draws and not one.remaining:
                one.error = one.reading.error if one.reading else None
                end: Finish = "length" if one.request.prompt_only else "stop"
                piece = self._end(one, "error" if one.error else end, "")
                self._backlog.append(replace(piece, prompt_logprobs=one.prompt_logprobs))
        if guess is not None:
            guess.learn(trials, time.perf_counter() - drafted)
        accepted = sum(trial.accepted for trial in trials)
        self._totals["steps"] += 1
        self._totals["drafted_tokens"] += sum(map(len, drafts))
        self._totals["accepted_tokens"] += accepted
        self._totals[f"{kind}_tokens"] += tokens_computed + accepted
        self._totals[f"{kind}_s"] += time.perf_counter() - begun
        return self._take_backlog()

    def _draw(self, logits: np.ndarray, trials: Many[Trial]) -> None:
        """A token for each trial, from its row of logits [R, V], and another as long as the last was
        the draft that the next row comes after."""
        while trials:
            rows = [trial.row for trial in trials]
            some = logits if len(rows) == len(logits) else logits[rows]
            drawing = [trial.sequence for trial in trials]
            tokens = choose(some, [one.chooser for one in drawing])
            logprobs = of_drawn(some, tokens, drawing)
            going: list[Trial] = []
            for trial, token, logprob in zip(trials, tokens, logprobs, strict=True):
                sequence = trial.sequence
                try:
                    if isinstance(token, Exception):
                        raise token
                    self._backlog.append(self._took(sequence, token, logprob))
                    if sequence.finish is None and trial.right(token):
                        self.scheduler.progress(sequence, 1)
                        going.append(trial)
                except Exception as error:  # noqa: BLE001  ends this request; its batch-mates go on
                    sequence.error = error
                    self._backlog.append(self._end(sequence, "error", ""))
            trials = going

    def abort(self, id: str) -> bool:
        """End a request; its pages are free at once, its last piece comes with the next step.

        False when it is not running (any more).
        """
        sequence = self._active.get(id)
        if sequence is None:
            return False
        self._backlog.append(self._end(sequence, "abort", ""))
        return True

    def generate(self, requests: Many[Request]) -> list[Reply]:
        """All replies, in the order of the requests. The first error among them is raised."""
        mine: dict[str, None] = {}  # in order
        replies: dict[str, Reply] = {}
        try:
            for request in requests:
                self.submit(request)
                mine[request.id] = None
            while len(replies) < len(mine):
                for piece in self._pieces_of(mine):
                    if piece.reply:
                        replies[piece.request_id] = piece.reply
        finally:
            self._drop(mine)
        for reply in replies.values():
            if reply.error is not None:
                raise reply.error
        return [replies[id] for id in mine]

    def stream(self, request: Request) -> Iterator[Piece]:
        """The pieces of one reply as they come. Closing the iterator aborts the request."""
        self.submit(request)
        ended = False
        try:
            while not ended:
                for piece in self._pieces_of([request.id]):
                    ended = piece.reply is not None
                    if piece.reply and piece.reply.error:
                        raise piece.reply.error
                    yield piece
        finally:
            self._drop([request.id])

    def score(
        self, prompt: Many[int], continuations: Many[Many[int]], *, adapter: str | None = None
    ) -> list[Score]:
        """How likely each continuation of the prompt is; see score_many."""
        return self.score_many([(prompt, continuations)], adapter=adapter)[0]

    def score_many(
        self, asked: Many[tuple[Many[int], Many[Many[int]]]], *, adapter: str | None = None
    ) -> list[list[Score]]:
        """Of each (prompt, continuations), all token ids: the continuations' scores, in order.

        What begins alike is computed once, whichever prompts it is in (engine/score.py); neither
        the order nor what ran before changes a score by more than rounding does.
        """
        return score_many(self, asked, adapter)

    def embed(
        self, texts: Many[Many[int]], *, normalise: bool = False, adapter: str | None = None
    ) -> np.ndarray:
        """float32 [texts, hidden]: of each text's token ids, the mean of the hidden states after
        the final norm. normalise: each row's length is 1, so that products are cosines."""
        requests = [Request(ids, embed=True, adapter=adapter) for ids in texts]
        rows = [embedding(reply) for reply in self.generate(requests)]
        found = np.array(rows, np.float32).reshape(-1, self.model.config.hidden)
        return unit(found) if normalise else found

    def load_adapter(self, name: str, adapter: Path | Artifact) -> None:
        """See Adapters.load."""
        self.adapters.load(name, adapter)

    def unload_adapter(self, name: str) -> None:
        """Take an adapter off again; refused while requests use it."""
        adapter = self.adapters[name]
        using = sum(1 for one in self._active.values() if one.adapter is adapter)
        if using:
            raise RequestError(
                f"adapter {name!r}",
                rule=f"is in use by {using} requests",
                next="wait for them, or abort them",
            )
        self.adapters.unload(name)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the state of queue and cache."""
        total = self._totals

        def speed(kind: str) -> float:
            seconds = total[f"{kind}_s"]
            return total[f"{kind}_tokens"] / seconds if seconds else 0.0

        return total | {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "preemptions": self.scheduler.preemptions,
            "pages": self.pool.pages,
            "pages_used": self.pool.pages - self.pool.free,
            "pages_cached": self.pool.cached,
            "page_tokens": self.pool.page_tokens,
            "prefix_hit_rate": total["cached_tokens"] / max(1, total["prompt_tokens"]),
            "acceptance_rate": total["accepted_tokens"] / max(1, total["drafted_tokens"]),
            "prefill_tokens_per_s": speed("prefill"),
            "decode_tokens_per_s": speed("decode"),
        }

    def _took(self, sequence: Sequence, token: int, logprob: Logprob | None) -> Piece:
        """A token was drawn: the text that it makes certain, and whether it was the last."""
        sampling = sequence.request.sampling
        logprobs = () if logprob is None else (logprob,)
        sequence.logprobs += logprobs
        before = None if sequence.reply_tokens else sequence.prompt_logprobs
        sequence.append(token)
        sequence.chooser.took(token)
        self._totals["completion_tokens"] += 1
        finish: Finish | None = None
        text = ""
        if token in sequence.chooser.ends:
            finish = "stop"
        else:
            text = sequence.out.push(token, free=sequence.reply_tokens <= sampling.min_tokens)
            if sequence.out.stopped or sequence.chooser.complete:
                finish = "stop"
            elif sequence.reply_tokens >= sequence.limit:
                finish = "length"
        if finish is None:
            return Piece(
                sequence.request.id, text, (token,), logprobs=logprobs, prompt_logprobs=before
            )
        text += sequence.out.flush()
        if sequence.out.stopped:
            finish = "stop"
        piece = self._end(sequence, finish, text, (token,))
        return replace(piece, logprobs=logprobs, prompt_logprobs=before)

    def _end(
        self, sequence: Sequence, finish: Finish, text: str, ids: tuple[int, ...] = ()
    ) -> Piece:
        sequence.finish = finish
        self.scheduler.remove(sequence)
        del self._active[sequence.request.id]
        self._totals["prompt_tokens"] += sequence.prompt_tokens
        self._totals["cached_tokens"] += sequence.cached_tokens or 0
        return Piece(sequence.request.id, text, ids, finish, sequence.reply())

    def _take_backlog(self) -> list[Piece]:
        pieces, self._backlog = self._backlog, []
        return pieces

    def _pieces_of(self, ids: Collection[str]) -> list[Piece]:
        """One step's pieces for `ids`; those of other requests wait for the next step()."""
        assert self.busy, f"nothing runs, yet {list(ids)} did not end"
        pieces = self.step()
        self._backlog += [piece for piece in pieces if piece.request_id not in ids]
        return [piece for piece in pieces if piece.request_id in ids]

    def _drop(self, ids: Collection[str]) -> None:
        """Abort what still runs of `ids` and forget what they said last: nobody waits for them."""
        for id in ids:
            self.abort(id)
        self._backlog = [piece for piece in self._backlog if piece.request_id not in ids]
