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

import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from herdbook.engine.adapters import Adapters
from herdbook.engine.grammar import Grammars, Matcher
from herdbook.engine.logprobs import of_drawn, read_prompt
from herdbook.engine.pages import PagePool
from herdbook.engine.reading import embedding, reading_for
from herdbook.engine.request import Finish, Logprob, Piece, Reply, Request, Sampling
from herdbook.engine.runner import Runner
from herdbook.engine.sampling import Chooser, choose
from herdbook.engine.scheduler import Scheduler
from herdbook.engine.score import Score, score_many
from herdbook.engine.sequence import Sequence
from herdbook.engine.speculation import Trial, speculation
from herdbook.engine.text import TextOut, escapes
from herdbook.errors import CapacityError, RequestError
from herdbook.model.decoder import Decoder
from herdbook.model.prefix import find_context
from herdbook.training.memory import free_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from herdbook.book.book import Artifact
    from herdbook.tokens.tokenizer import Tokenizer

#: the cache's size unless it is given: this, or what 4096 tokens need where that is more
CACHE_BYTES = 2**30
CACHE_TOKENS = 4096
#: and never more than this many full contexts
CACHE_CONTEXTS = 16


class Engine:
    """Paged cache, continuous batching, prefix sharing, over one decoder.

    cache_bytes or pages: the size of the cache. cache_dtype: how it keeps its numbers, float32,
    bfloat16 or int8 (a scale for each token and head); without it as the model computes, or, where
    that leaves too little room, in fewer bits. max_batch_tokens: the most tokens that one step
    computes; a longer prompt is computed in chunks, while others go on decoding.

    speculate="ngram" guesses the next tokens from the text so far, draft=decoder with a smaller model
    of the same vocabulary; several are then checked in one step, where that is faster. The replies
    are those of an engine without (what is guaranteed, and how far: engine/speculation.py).
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        *,
        page_tokens: int = 16,
        pages: int | None = None,
        cache_bytes: int | None = None,
        cache_dtype: torch.dtype | None = None,
        max_batch_tokens: int = 512,
        speculate: Literal["ngram"] | None = None,
        draft: Decoder | None = None,
    ) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.vocab = decoder.config.vocab
        self.context = decoder.config.max_pos  # tokens
        if cache_dtype is None:
            cache_dtype = _cache_dtype(decoder, cache_bytes)
        if pages is None:
            drafts = [] if draft is None else [draft]
            pages = _pages(decoder, drafts, page_tokens, cache_bytes, cache_dtype)
        self._guesses = (speculate, draft)
        self._size = (pages, page_tokens, max_batch_tokens)
        self.runner = Runner(decoder, pages, page_tokens, cache_dtype)
        self.escapes = escapes(tokenizer.chat_template if tokenizer else None)
        self.stop_ids = tokenizer.stop_ids if tokenizer else frozenset[int]()
        self._grammars = Grammars(tokenizer, self.vocab) if tokenizer else None
        self._active: dict[str, Sequence] = {}
        self.adapters = Adapters(decoder)
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
            "drafted_tokens": 0,
            "accepted_tokens": 0,
        }
        self.forget()

    def forget(self) -> None:
        """Empty the cache: later replies depend on nothing that was asked before."""
        assert not self._active, "forget() while requests run"
        pages, page_tokens, max_batch_tokens = self._size
        self.pool = PagePool(pages, page_tokens)
        share = self.decoder.memory == "pages"
        self.scheduler = Scheduler(self.pool, max_batch_tokens, share=share)
        self.runner.forget()
        self.speculation = speculation(*self._guesses, self.decoder, self.scheduler)

    @property
    def busy(self) -> bool:
        """There is something to be had from step()."""
        return bool(self._active or self._backlog)

    @property
    def most_tokens(self) -> int:
        """The most tokens, prompt and reply together, that one request can have."""
        return min(self.context, self.pool.tokens)

    def matcher(self, sampling: Sampling) -> Matcher | None:
        """The beginning of the request's grammar. Reading one takes up to seconds, the second time
        nothing: so a server calls this in a thread of its own before it submits.
        """
        if sampling.grammar is None:
            return None
        if self._grammars is None:
            raise RequestError(
                "a grammar",
                rule="needs a tokenizer, and this model came without one",
                next="load a folder with tokenizer.json",
            )
        return self._grammars.matcher(sampling.grammar)

    def submit(self, request: Request) -> None:
        """Queue a request. One that can never be served is refused here, with the numbers."""
        if request.id in self._active:
            raise RequestError(
                f"request id {request.id!r}", rule="is already running", next="give another id"
            )
        sequence = self.sequence(request)
        self._active[request.id] = sequence
        self.scheduler.add(sequence)
        self._totals["requests"] += 1

    def sequence(self, request: Request) -> Sequence:
        """What would run for a request, which is checked; nothing is queued."""
        ids, sampling = request.ids, request.sampling
        if not len(ids):
            raise RequestError("an empty prompt", rule="cannot be continued", next="send some text")
        self.check_ids(ids, self.decoder.ids)
        if not isinstance(request.priority, int):
            raise RequestError(
                f"priority={request.priority!r}",
                rule="must be a whole number; the lower, the more urgent",
                next="leave it out, or write 0 for what is neither urgent nor able to wait",
            )
        stop = (*sampling.stop, *request.stop)
        if stop and self.tokenizer is None:
            raise RequestError(
                f"stop={list(stop)!r}",
                rule="needs a tokenizer, and this model came without one",
                next="stop by max_tokens, or load a folder with tokenizer.json",
            )
        self.check_ids(sampling.stop_token_ids, self.vocab, "stop_token_ids: ")
        self.check_ids([id for id, _ in sampling.logit_bias], self.vocab, "logit_bias: ")
        adapter = None if request.adapter is None else self.adapters[request.adapter]
        soft = self.decoder.soft if adapter is None else adapter.soft
        front = (
            list(range(-soft.tokens, 0)) if soft else []
        )  # virtual tokens: where others have ids
        reading = reading_for(replace(request, ids=[*front, *ids]), self.decoder, len(front))
        given = ids
        if reading is None:
            ids = self.decoder.prompt(ids)
        if sampling.prompt_logprobs is not None:
            self._check_causal(given, ids)
        request = replace(request, ids=[*front, *ids])
        room = self.most_tokens - len(request.ids)
        if room < (1 if reading is None else 0):
            raise self._too_long(len(request.ids))
        config = self.decoder.config
        own = frozenset[int]() if sampling.ignore_eos else self.stop_ids
        ends = own.union(sampling.stop_token_ids)
        return Sequence(
            request,
            limit=min(sampling.max_tokens, room),
            chooser=Chooser(
                sampling, [id % self.vocab for id in ids], self.vocab, ends, self.matcher(sampling)
            ),
            out=TextOut(
                self.tokenizer.stream() if self.tokenizer else None,
                stop,
                trim=request.trim,
                escaped=None if sampling.grammar else self.escapes,
            ),
            context=find_context(ids, config).behind(len(front)) if config.prefix else None,
            whole=self.decoder.whole_prompts,
            reading=reading,
            adapter=adapter,
            soft=soft,
        )

    def step(self) -> list[Piece]:
        """Compute one step; what it added to each request. [] when nothing is finished or running."""
        pieces, self._backlog = self._backlog, []
        batch = self.scheduler.schedule()
        if not batch:
            assert not self._active, "requests wait, yet none was scheduled"
            return pieces
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
        trials: list[Trial] = []
        for one, end, rows, some in zip(batch, accumulate(wanted), wanted, drafts, strict=True):
            if logits is not None and one.tells_prompt:
                read_prompt(one, logits[end - rows : end])
            if rows and one.scheduled == one.remaining:
                trials.append(Trial(one, end - len(some) - 1, some))
        self.scheduler.advance(batch)
        if logits is not None:
            pieces += self._draw(logits, trials)
        for sequence in batch:
            if sequence.reading is not None and not sequence.remaining:
                sequence.error = sequence.reading.error
                pieces.append(self._end(sequence, "error" if sequence.error else "stop", ""))
        if guess is not None:
            guess.learn(trials, time.perf_counter() - drafted)
        accepted = sum(trial.accepted for trial in trials)
        self._totals["steps"] += 1
        self._totals["drafted_tokens"] += sum(map(len, drafts))
        self._totals["accepted_tokens"] += accepted
        self._totals[f"{kind}_tokens"] += tokens_computed + accepted
        self._totals[f"{kind}_s"] += time.perf_counter() - begun
        return pieces

    def _draw(self, logits: Tensor, trials: Many[Trial]) -> list[Piece]:
        """A token for each trial, from its row of logits [R, V], and another as long as the last was
        the draft that the next row comes after."""
        pieces: list[Piece] = []
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
                    pieces.append(self._took(sequence, token, logprob))
                    if sequence.finish is None and trial.right(token):
                        self.scheduler.progress(sequence, 1)
                        going.append(trial)
                except Exception as error:  # noqa: BLE001  ends this request; its batch-mates go on
                    sequence.error = error
                    pieces.append(self._end(sequence, "error", ""))
            trials = going
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
    ) -> Tensor:
        """float32 [texts, hidden]: of each text's token ids, the mean of the hidden states after
        the final norm. normalise: each row's length is 1, so that products are cosines."""
        requests = [Request(ids, embed=True, adapter=adapter) for ids in texts]
        rows = [embedding(reply) for reply in self.generate(requests)]
        found = torch.stack(rows) if rows else torch.zeros(0, self.decoder.config.hidden)
        return F.normalize(found) if normalise else found

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

    def check_ids(self, ids: Many[int], vocab: int, of: str = "") -> None:
        """Refuse ids that are not below `vocab`."""
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise RequestError(
                f"{of}token id {bad}",
                rule=f"is outside the vocabulary of {self.vocab} tokens",
                next="encode the prompt with this model's own tokenizer",
            )

    def _took(self, sequence: Sequence, token: int, logprob: Logprob | None) -> Piece:
        """A token was drawn: the text that it makes certain, and whether it was the last."""
        sampling = sequence.request.sampling
        logprobs = () if logprob is None else (logprob,)
        sequence.logprobs += logprobs
        before = None
        if sampling.prompt_logprobs is not None and not sequence.reply_tokens:
            before = tuple(sequence.prompt_logprobs)
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

    def _check_causal(self, given: Many[int], ids: Many[int]) -> None:
        """A prompt's tokens have logprobs only where each was computed without those after it."""
        d = self.decoder
        if d.config.prefix or d.whole_prompts or d.ids != self.vocab or list(given) != list(ids):
            raise RequestError(
                "prompt_logprobs",
                rule="do not exist in this model: it reads its prompt as a whole",
                next="ask for logprobs of the reply",
            )

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


def _token_bytes(decoder: Decoder, dtype: torch.dtype) -> int:
    """What the cache needs for a token's keys and values."""
    c = decoder.config
    heads = 2 * c.layers * c.kv_heads
    return heads * (c.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))


def _cache_dtype(decoder: Decoder, cache_bytes: int | None) -> torch.dtype:
    """The widest in which the cache holds a context, or CACHE_TOKENS of it."""
    if decoder.memory != "pages":
        return decoder.dtype
    if cache_bytes is None:
        cache_bytes = free_bytes() // 2 if decoder.device.type == "cpu" else sys.maxsize
    tokens = min(decoder.config.max_pos, CACHE_TOKENS)
    for kind in (decoder.dtype, torch.bfloat16):
        if tokens * _token_bytes(decoder, kind) <= cache_bytes:
            return kind
    return torch.int8


def _pages(
    decoder: Decoder,
    drafts: Many[Decoder],
    page_tokens: int,
    cache_bytes: int | None,
    dtype: torch.dtype,
) -> int:
    """How many pages the cache gets; every page is one of each decoder."""
    c = decoder.config
    token_bytes = _token_bytes(decoder, dtype) + sum(_token_bytes(d, d.dtype) for d in drafts)
    if cache_bytes is None:
        tokens = max(CACHE_BYTES // token_bytes, CACHE_TOKENS)
        tokens = min(tokens, CACHE_CONTEXTS * c.max_pos)
    else:
        tokens = cache_bytes // token_bytes
        if tokens < page_tokens:
            raise CapacityError(
                f"cache_bytes={cache_bytes}",
                rule=f"holds no page: {page_tokens} tokens need {token_bytes * page_tokens} bytes",
                next=f"give at least {token_bytes * page_tokens}",
            )
    return max(1, tokens // page_tokens)
