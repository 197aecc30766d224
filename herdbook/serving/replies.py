"""How replies are written down, in OpenAI's shapes: whole, or in parts as they come.

A `Shape` knows what the client asked to be told; it makes a `Choice` for each reply under way, which
takes the engine's pieces. What a choice gives in parts, joined, is what it gives as a whole.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from herdbook.engine.engine import Engine
from herdbook.engine.request import Logprob, Piece
from herdbook.serving import logprobs
from herdbook.serving.logprobs import Listing, Token
from herdbook.serving.schema import Ask, ChatAsk, CompletionAsk
from herdbook.serving.tools import Calls


class Choice:
    """One reply under way."""

    def __init__(self, listing: Listing | None) -> None:
        self.text = ""
        self.finish: str | None = None
        self.tokens: list[Token] = []
        self._listing = listing
        self._drawn, self._logprob = 0, 0.0

    def took(self, piece: Piece) -> list[dict[str, Any]]:
        """What this piece adds, as contents of chunks."""
        return self._said(piece, piece.text)

    def _said(self, piece: Piece, text: str) -> list[dict[str, Any]]:
        """The same where of the piece's text only `text` is shown."""
        tokens = self._listing.took(piece) if self._listing else []
        self.text += text
        self.tokens += tokens
        self.finish = piece.finish
        self._drawn += len(piece.ids)
        self._logprob += sum(one.logprob for one in piece.logprobs)
        return [self.part(text, tokens)] if text or tokens else []

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, the one that ended it included: what best_of goes by."""
        return self._logprob / max(1, self._drawn)

    def opening(self) -> dict[str, Any] | None:
        """The content of its first chunk."""
        raise NotImplementedError

    def part(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError


class Shape:
    """The form of a reply to one request."""

    kind = chunk_kind = prompt_key = ""

    def __init__(self, engine: Engine, ask: Ask, prompts: Sequence[list[int]], id: str) -> None:
        self.tokenizer, self.top, self.ask = engine.tokenizer, ask.told, ask
        self.prompts = prompts  # the ids of each
        own = frozenset[int]() if ask.ignore_eos else engine.intake.stop_ids
        self._ends = own.union(ask.stop_token_ids or ())
        self._escaped = bool(engine.intake.escapes)
        self.id = f"{id}-{uuid.uuid4().hex}"
        self.head = {"id": self.id, "created": int(time.time()), "model": ask.model}
        # The worker runs the first of equal prompts ahead of the others: so each one's are known.
        self._first = [prompts.index(ids) for ids in prompts]
        self._known: dict[int, tuple[Logprob | None, ...]] = {}

    def listing(self, trim: bool) -> Listing | None:
        if self.top is None:
            return None
        return Listing(self.tokenizer, self._ends, trim=trim, escaped=self._escaped)

    def choice(self, at: int) -> Choice:
        raise NotImplementedError

    def learn(self, at: int, piece: Piece) -> None:
        """What a piece of request `at` says about its prompt."""
        if piece.prompt_logprobs is not None:
            self._known[at // self.ask.draws] = piece.prompt_logprobs

    def known(self, prompt: int) -> tuple[Logprob | None, ...]:
        """The logprobs of a prompt's tokens."""
        return self._known[self._first[prompt]]

    def about_prompts(self, body: dict[str, Any]) -> None:
        """Add the prompts' own logprobs to a whole reply, if asked for."""

    def _of_prompt(self, at: int) -> list[dict[str, Any] | None]:
        assert self.ask.prompt_logprobs is not None
        return logprobs.of_prompt(self.known(at), self.ask.prompt_logprobs, self.tokenizer)


class ChatChoice(Choice):
    """One that may call tools; a call is handed out as soon as it is whole."""

    def __init__(self, shape: ChatShape) -> None:
        super().__init__(shape.listing(trim=shape.ask.grammar is None))
        self._shape = shape
        self._calls = Calls(shape.callable, shape.most_calls) if shape.callable else None

    def took(self, piece: Piece) -> list[dict[str, Any]]:
        if self._calls is None:
            return super().took(piece)
        text, calls = self._calls.push(piece.text, last=piece.finish is not None)
        first = len(self._calls.calls) - len(calls)
        out = self._said(piece, text)
        out += [
            {"delta": {"tool_calls": [{"index": at, **call}]}, "logprobs": None}
            for at, call in enumerate(calls, start=first)
        ]
        if piece.finish == "stop" and self._calls.calls:
            self.finish = "tool_calls"
        return out

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        told = self._told(tokens) if tokens else None
        return {"delta": {"content": text} if text or tokens else {}, "logprobs": told}

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self._calls is not None and self._calls.calls:
            message |= {"content": self.text or None, "tool_calls": self._calls.calls}
        return {"message": message, "logprobs": self._told(self.tokens)}

    def _told(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        top, tokenizer = self._shape.top, self._shape.tokenizer
        if top is None:
            return None
        assert tokenizer is not None  # else there was no prompt
        return logprobs.chat(tokens, top, tokenizer)


class ChatShape(Shape):
    kind, chunk_kind, prompt_key = "chat.completion", "chat.completion.chunk", "messages"

    def __init__(self, engine: Engine, ask: ChatAsk, ids: list[int]) -> None:
        super().__init__(engine, ask, [ids], "chatcmpl")
        self.callable = [tool.function.name for tool in ask.callable]
        self.most_calls = ask.most_calls

    def choice(self, at: int) -> Choice:
        return ChatChoice(self)

    def about_prompts(self, body: dict[str, Any]) -> None:
        if self.ask.prompt_logprobs is not None:
            body["prompt_logprobs"] = self._of_prompt(0)


class CompletionChoice(Choice):
    def __init__(self, shape: CompletionShape, prompt: int) -> None:
        super().__init__(shape.listing(trim=False))
        self._shape, self._prompt = shape, prompt
        self._echo = shape.echoes[prompt] if shape.echoes else ""

    def opening(self) -> dict[str, Any] | None:
        if not self._shape.echoes:
            return None
        return {"text": self._echo, "logprobs": self._told(self._echoed(), 0)}

    def part(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._told(tokens, len(self._echo)) if tokens else None}

    def whole(self) -> dict[str, Any]:
        told = self._told(self.tokens, len(self._echo))
        if told and (before := self._told(self._echoed(), 0)):
            told = {key: before[key] + told[key] for key in told}
        return {"text": self._echo + self.text, "logprobs": told}

    def _echoed(self) -> list[Token]:
        shape, ids = self._shape, self._shape.prompts[self._prompt]
        if not shape.echoes or shape.top is None:
            return []
        assert shape.tokenizer is not None  # else there was no echo
        known = shape.known(self._prompt)
        return logprobs.prompt_tokens(shape.tokenizer, ids, known, shape.specials[self._prompt])

    def _told(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        if self._shape.top is None:
            return None
        return logprobs.completion(tokens, self._shape.top, self._shape.tokenizer, offset)


class CompletionShape(Shape):
    """echoes: the text of each prompt, if it is to be repeated."""

    kind, chunk_kind, prompt_key = "text_completion", "text_completion", "prompt"

    def __init__(
        self,
        engine: Engine,
        ask: CompletionAsk,
        prompts: Sequence[list[int]],
        echoes: Sequence[str],
    ) -> None:
        super().__init__(engine, ask, prompts, "cmpl")
        self.echoes = echoes
        self.specials = [not isinstance(prompt, str) for prompt in ask.prompt]

    def choice(self, at: int) -> Choice:
        return CompletionChoice(self, at // self.ask.draws)

    def about_prompts(self, body: dict[str, Any]) -> None:
        if self.ask.prompt_logprobs is not None:
            for one in body["choices"]:
                one["prompt_logprobs"] = self._of_prompt(one["index"] // self.ask.choices)


class Usage:
    """Tokens, counted as OpenAI does: a prompt once, however many choices it has."""

    def __init__(self, prompts: Sequence[Sequence[int]], draws: int) -> None:
        self._draws = draws
        self._prompt, self._reply, self._cached = sum(map(len, prompts)), 0, 0

    def add(self, at: int, piece: Piece) -> None:
        self._reply += len(piece.ids)
        if piece.reply is not None and at % self._draws == 0:
            self._cached += piece.reply.cached_tokens

    def __call__(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._reply,
            "total_tokens": self._prompt + self._reply,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


Pieces = AsyncIterator[tuple[int, Piece]]


async def whole(shape: Shape, pieces: Pieces, count: int, usage: Usage) -> dict[str, Any]:
    """The body of a reply with `count` replies under way, of which each prompt's best are told."""
    under_way = [shape.choice(at) for at in range(count)]
    draws, choices = shape.ask.draws, shape.ask.choices
    async for at, piece in pieces:
        shape.learn(at, piece)
        under_way[at].took(piece)
        usage.add(at, piece)
    told: list[Choice] = []
    for first in range(0, count, draws):
        some = under_way[first : first + draws]
        if choices < draws:
            some = sorted(some, key=lambda one: -one.mean_logprob)[:choices]
        told += some
    body = {**shape.head, "object": shape.kind, "usage": usage()}
    body["choices"] = [
        {"index": at, **one.whole(), "finish_reason": one.finish} for at, one in enumerate(told)
    ]
    shape.about_prompts(body)
    return body


async def parts(
    shape: Shape, pieces: Pieces, count: int, usage: Usage
) -> AsyncIterator[dict[str, Any]]:
    """The bodies of a stream: an opening, parts and an end for each choice; then the sums."""
    options = shape.ask.stream_options
    sums = bool(options and options.include_usage)
    always = bool(options and options.continuous_usage_stats)

    def chunk(choices: list[dict[str, Any]], with_usage: bool) -> dict[str, Any]:
        body = {**shape.head, "object": shape.chunk_kind, "choices": choices}
        if with_usage:
            body["usage"] = usage()
        elif sums:
            body["usage"] = None
        return body

    def choice(at: int, content: dict[str, Any], end: str | None = None) -> dict[str, Any]:
        return chunk([{"index": at, **content, "finish_reason": end}], with_usage=always)

    under_way = [shape.choice(at) for at in range(count)]
    opened: set[int] = set()
    async for at, piece in pieces:
        one = under_way[at]
        usage.add(at, piece)
        shape.learn(at, piece)
        if at not in opened:
            opened.add(at)
            if (opening := one.opening()) is not None:
                yield choice(at, opening)
        for content in one.took(piece):
            yield choice(at, content)
        if one.finish is not None:
            yield choice(at, one.part("", ()), one.finish)
    if sums:
        yield chunk([], with_usage=True)
