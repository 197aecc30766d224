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
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from herdbook.engine.pages import PagePool
from herdbook.engine.request import Finish, Piece, Reply, Request
from herdbook.engine.runner import Cache, Runner
from herdbook.engine.sampling import Chooser, choose
from herdbook.engine.scheduler import Scheduler
from herdbook.engine.sequence import Sequence
from herdbook.engine.text import TextOut, escapes
from herdbook.errors import CapacityError, RequestError
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.prefix import find_context

if TYPE_CHECKING:
    from herdbook.tokens.tokenizer import Tokenizer

#: the cache's size unless it is given: this, or what 4096 tokens need where that is more
CACHE_BYTES = 2**30
CACHE_TOKENS = 4096
#: and never more than this many full contexts
CACHE_CONTEXTS = 16


class Engine:
    """Paged cache, continuous batching, prefix sharing, over one decoder.

    cache_bytes or pages: the size of the cache. max_batch_tokens: the most tokens that one step
    computes; a longer prompt is computed in chunks, while others go on decoding.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        *,
        page_tokens: int = 16,
        pages: int | None = None,
        cache_bytes: int | None = None,
        max_batch_tokens: int = 512,
    ) -> None:
        decoder.need_head()
        self.decoder, self.tokenizer = decoder, tokenizer
        self.vocab = decoder.config.vocab
        self.context = decoder.config.max_pos  # tokens
        if pages is None:
            pages = cache_pages(decoder.config, decoder.dtype, page_tokens, cache_bytes)
        self._size = (pages, page_tokens, max_batch_tokens)
        self.escapes = escapes(tokenizer.chat_template if tokenizer else None)
        self.stop_ids = tokenizer.stop_ids if tokenizer else frozenset[int]()
        self._active: dict[str, Sequence] = {}
        self._backlog: list[Piece] = []  # made outside of step(), or for someone else's request
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
        }
        self.forget()

    def forget(self) -> None:
        """Empty the cache: later replies depend on nothing that was asked before."""
        assert not self._active, "forget() while requests run"
        pages, page_tokens, max_batch_tokens = self._size
        self.pool = PagePool(pages, page_tokens)
        share = self.decoder.memory == "pages"
        self.scheduler = Scheduler(self.pool, max_batch_tokens, share=share)
        self.runner = Runner(self.decoder, Cache(pages, page_tokens))

    @property
    def busy(self) -> bool:
        """There is something to be had from step()."""
        return bool(self._active or self._backlog)

    @property
    def most_tokens(self) -> int:
        """The most tokens, prompt and reply together, that one request can have."""
        return min(self.context, self.pool.tokens)

    def submit(self, request: Request) -> None:
        """Queue a request. One that can never be served is refused here, with the numbers."""
        ids, sampling = request.ids, request.sampling
        if not len(ids):
            raise RequestError("an empty prompt", rule="cannot be continued", next="send some text")
        bad = next((i for i in ids if not 0 <= i < self.decoder.ids), None)
        if bad is not None:
            raise RequestError(
                f"token id {bad}",
                rule=f"is outside the vocabulary of {self.vocab} tokens",
                next="encode the prompt with this model's own tokenizer",
            )
        if request.id in self._active:
            raise RequestError(
                f"request id {request.id!r}", rule="is already running", next="give another id"
            )
        stop = (*sampling.stop, *request.stop)
        if stop and self.tokenizer is None:
            raise RequestError(
                f"stop={list(stop)!r}",
                rule="needs a tokenizer, and this model came without one",
                next="stop by max_tokens, or load a folder with tokenizer.json",
            )
        ids = self.decoder.prompt(ids)
        request = replace(request, ids=ids)
        room = self.most_tokens - len(ids)
        if room < 1:
            raise self._too_long(len(ids))
        config = self.decoder.config
        sequence = Sequence(
            request,
            limit=min(sampling.max_tokens, room),
            chooser=Chooser(sampling, [id % self.vocab for id in ids], self.vocab),
            out=TextOut(
                self.tokenizer.stream() if self.tokenizer else None,
                stop,
                trim=request.trim,
                escaped=self.escapes,
            ),
            context=find_context(ids, config) if config.prefix else None,
            whole=self.decoder.whole_prompts,
        )
        self._active[request.id] = sequence
        self.scheduler.add(sequence)
        self._totals["requests"] += 1

    def step(self) -> list[Piece]:
        """Compute one step; what it added to each request. [] when nothing is finished or running."""
        pieces, self._backlog = self._backlog, []
        batch = self.scheduler.schedule()
        if not batch:
            assert not self._active, "requests wait, yet none was scheduled"
            return pieces
        begun = time.perf_counter()
        logits = self.runner.run(batch)
        ready = [one for one in batch if one.wanted]
        tokens_computed = sum(one.scheduled for one in batch)
        self.scheduler.advance(batch)
        if logits is not None:
            tokens = choose(logits, [one.chooser for one in ready])
            for sequence, token in zip(ready, tokens, strict=True):
                try:
                    if isinstance(token, Exception):
                        raise token
                    pieces.append(self._took(sequence, token))
                except Exception as error:  # noqa: BLE001  ends this request; its batch-mates go on
                    sequence.error = error
                    pieces.append(self._end(sequence, "error", ""))
        # A step counts as prefill when any sequence computed more than one token.
        kind = "prefill" if tokens_computed > len(batch) else "decode"
        self._totals["steps"] += 1
        self._totals[f"{kind}_tokens"] += tokens_computed
        self._totals[f"{kind}_s"] += time.perf_counter() - begun
        return pieces

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
        mine: list[str] = []
        replies: dict[str, Reply] = {}
        try:
            for request in requests:
                self.submit(request)
                mine.append(request.id)
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
            "prefill_tokens_per_s": speed("prefill"),
            "decode_tokens_per_s": speed("decode"),
        }

    def _took(self, sequence: Sequence, token: int) -> Piece:
        """A token was drawn: the text that it makes certain, and whether it was the last."""
        sequence.append(token)
        sequence.chooser.took(token)
        self._totals["completion_tokens"] += 1
        finish: Finish | None = None
        text = ""
        if token in self.stop_ids and not sequence.request.sampling.ignore_eos:
            finish = "stop"
        else:
            text = sequence.out.push(token)
            if sequence.out.stopped:
                finish = "stop"
            elif sequence.reply_tokens >= sequence.limit:
                finish = "length"
        if finish is None:
            return Piece(sequence.request.id, text, (token,))
        text += sequence.out.flush()
        if sequence.out.stopped:
            finish = "stop"
        return self._end(sequence, finish, text, (token,))

    def _end(
        self, sequence: Sequence, finish: Finish, text: str, ids: tuple[int, ...] = ()
    ) -> Piece:
        sequence.finish = finish
        self.scheduler.remove(sequence)
        del self._active[sequence.request.id]
        self._totals["prompt_tokens"] += sequence.prompt_tokens
        self._totals["cached_tokens"] += sequence.cached_tokens or 0
        return Piece(sequence.request.id, text, ids, finish, sequence.reply())

    def _pieces_of(self, ids: Many[str]) -> list[Piece]:
        """One step's pieces for `ids`; those of other requests wait for the next step()."""
        assert self.busy, f"nothing runs, yet {ids} did not end"
        pieces = self.step()
        self._backlog += [piece for piece in pieces if piece.request_id not in ids]
        return [piece for piece in pieces if piece.request_id in ids]

    def _drop(self, ids: Many[str]) -> None:
        """Abort what still runs of `ids` and forget its last words: nobody waits for them."""
        for id in ids:
            if self.abort(id):
                self._backlog.pop()

    def _too_long(self, tokens: int) -> CapacityError:
        if tokens >= self.context:
            return CapacityError(
                f"a prompt of {tokens} tokens",
                rule=f"leaves no room for a reply: the model's context is {self.context} tokens",
                next="shorten the prompt, or leave out the oldest turns of the conversation",
            )
        return CapacityError(
            f"a prompt of {tokens} tokens",
            rule=f"does not fit: the cache has {self.pool.pages} pages of "
            f"{self.pool.page_tokens} tokens, {self.pool.tokens} in all",
            next="shorten the prompt, or give the engine more cache_bytes",
        )


def token_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """A token's keys and values in the cache."""
    return 2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize


def cache_pages(
    config: DecoderConfig, dtype: torch.dtype, page_tokens: int, cache_bytes: int | None
) -> int:
    """How many pages the cache gets."""
    each = token_bytes(config, dtype)
    if cache_bytes is None:
        tokens = max(CACHE_BYTES // each, CACHE_TOKENS)
        tokens = min(tokens, CACHE_CONTEXTS * config.max_pos)
    else:
        tokens = cache_bytes // each
        if tokens < page_tokens:
            raise CapacityError(
                f"cache_bytes={cache_bytes}",
                rule=f"holds no page: {page_tokens} tokens need {each * page_tokens} bytes",
                next=f"give at least {each * page_tokens}",
            )
    return max(1, tokens // page_tokens)
