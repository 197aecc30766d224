"""From a request to its sequence: what is checked before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from typing import TYPE_CHECKING

from herdbook.engine.adapters import Adapters
from herdbook.engine.grammar import Grammars, Matcher
from herdbook.engine.pages import PagePool
from herdbook.engine.reading import PromptLogprobs, Reading, reading_for
from herdbook.engine.request import Request, Sampling
from herdbook.engine.sampling import Chooser
from herdbook.engine.sequence import Sequence
from herdbook.engine.text import TextOut, escapes
from herdbook.errors import CapacityError, RequestError
from herdbook.model.interface import Model
from herdbook.model.prefix import find_context

if TYPE_CHECKING:
    from herdbook.tokens.tokenizer import Tokenizer


class Intake:
    """What a model with its tokenizer, adapters and pages can be asked for."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer | None, adapters: Adapters, pool: PagePool
    ) -> None:
        self.model, self.tokenizer, self.adapters, self.pool = model, tokenizer, adapters, pool
        self.vocab = model.config.vocab
        self.stop_ids = tokenizer.stop_ids if tokenizer else frozenset[int]()
        self.escapes = escapes(tokenizer.chat_template if tokenizer else None)
        self._grammars = Grammars(tokenizer, self.vocab) if tokenizer else None

    @property
    def most_tokens(self) -> int:
        """The most tokens, prompt and reply together, that one request can have."""
        return min(self.model.config.max_pos, self.pool.tokens)

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

    def sequence(self, request: Request) -> Sequence:
        """What runs for a request; RequestError or CapacityError for one that can never be served."""
        sampling, config = request.sampling, self.model.config
        if not len(request.ids):
            raise RequestError("an empty prompt", rule="cannot be continued", next="send some text")
        self.check_ids(request.ids, self.model.ids)
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
        ids = request.ids
        adapter = None if request.adapter is None else self.adapters[request.adapter]
        soft = self.model.soft if adapter is None else adapter.soft
        front = (
            list(range(-soft.tokens, 0)) if soft else []
        )  # virtual tokens: others have ids there
        virtual = replace(request, ids=[*front, *ids])
        reading: Reading | None = reading_for(virtual, self.model, len(front))
        if reading is None:
            ids = self.model.prompt(ids)
            if sampling.prompt_logprobs is not None:
                self._check_causal(request.ids, ids)
                reading = PromptLogprobs(ids, sampling.prompt_logprobs, len(front))
        room = self.most_tokens - len(front) - len(ids)
        if room < (0 if request.embed or request.targets or request.prompt_only else 1):
            raise self._too_long(len(front) + len(ids))
        own = frozenset[int]() if sampling.ignore_eos else self.stop_ids
        ends = own.union(sampling.stop_token_ids)
        return Sequence(
            replace(request, ids=[*front, *ids]),
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
            whole=self.model.whole_prompts,
            reading=reading,
            adapter=adapter,
            soft=soft,
        )

    def check_ids(self, ids: Many[int], vocab: int, of: str = "") -> None:
        """Refuse ids that are not below `vocab`."""
        bad = next((i for i in ids if not 0 <= i < vocab), None)
        if bad is not None:
            raise RequestError(
                f"{of}token id {bad}",
                rule=f"is outside the vocabulary of {self.vocab} tokens",
                next="encode the prompt with this model's own tokenizer",
            )

    def _check_causal(self, given: Many[int], ids: Many[int]) -> None:
        """A prompt's tokens have logprobs only where each was computed without those after it."""
        d = self.model
        if d.config.prefix or d.whole_prompts or d.ids != self.vocab or list(given) != list(ids):
            raise RequestError(
                "prompt_logprobs",
                rule="do not exist in this model: it reads its prompt as a whole",
                next="ask for logprobs of the reply",
            )

    def _too_long(self, tokens: int) -> CapacityError:
        context = self.model.config.max_pos
        if tokens >= context:
            return CapacityError(
                f"a prompt of {tokens} tokens",
                rule=f"leaves no room for a reply: the model's context is {context} tokens",
                next="shorten the prompt, or leave out the oldest turns of the conversation",
            )
        return CapacityError(
            f"a prompt of {tokens} tokens",
            rule=f"does not fit: the cache has {self.pool.pages} pages of "
            f"{self.pool.page_tokens} tokens, {self.pool.tokens} in all",
            next="shorten the prompt, or give the engine more cache_bytes",
        )
