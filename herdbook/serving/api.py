"""OpenAI's API over our workers, as a FastAPI application.

    POST /v1/chat/completions   messages → the model's own template → reply
    POST /v1/completions        text or token ids → continuation
    GET  /v1/models             what is served
    POST /tokenize, /detokenize text or messages → token ids, and back (as vLLM has it)
    GET  /health                200 when every model can be had, 503 before
    GET  /metrics               for Prometheus
    GET  /                      a small chat page

What a reply is made of is decided elsewhere: `tokens.chat.render` turns messages into ids (the same
call as in training, so the model sees what it was trained on), the engine turns ids into pieces.
This file only translates. It never truncates: a prompt that does not fit the context is refused
with the numbers. A reply without `max_tokens` may fill the context (a plain completion: 16 tokens,
as with OpenAI); without `temperature` it is greedy (why: `Ask.sampling`).

Every error, of whatever origin, is in OpenAI's shape (`problems`).
An error before the first token has its proper status, streamed or not: the status line waits for
the first piece. One after it comes as a last `data:` line in this shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import HTMLResponse, JSONResponse, Response

from herdbook.engine.request import Piece, Request
from herdbook.serving import monitoring, problems, tokenizing
from herdbook.serving.guard import Guard
from herdbook.serving.keyring import KeyRing
from herdbook.serving.models import Models
from herdbook.serving.prompts import budget, decoded, encoded, rendered
from herdbook.serving.schema import Ask, ChatAsk, CompletionAsk
from herdbook.serving.streaming import EventStream, data, unless_gone
from herdbook.serving.visits import Counts, Visits, visit_of
from herdbook.serving.worker import Worker

PATHS = (
    "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, POST /tokenize, "
    "POST /detokenize, GET /health, GET /metrics, GET /"
)


def app(
    models: Mapping[str, Worker], *, key: str | None = None, ring: KeyRing | None = None
) -> FastAPI:
    """The application over started workers, or over `Models` that start them when asked for.

    With a `key`, or with a `ring` of several, all but / and /health wants
    `Authorization: Bearer KEY`. It stops no worker: who made them does.
    """
    herd = models if isinstance(models, Models) else Models(models)
    counts = Counts()
    api = FastAPI(title="Herdbook", docs_url=None, redoc_url=None, openapi_url=None)
    api.add_middleware(Guard, ring=ring or KeyRing(key))
    api.add_middleware(Visits, counts=counts)
    problems.install(api, PATHS)

    async def served(http: Http, name: str) -> Worker:
        taking = herd.take(name, visit_of(http.scope))
        worker = await unless_gone(http.receive, taking)
        if worker is None:
            raise problems.Refusal(499, "the client has gone")
        return worker

    @api.post("/v1/chat/completions")
    async def chat_completions(ask: ChatAsk, http: Http) -> Response:
        worker = await served(http, ask.model)
        turns = [{"role": turn.role, "content": turn.content} for turn in ask.messages]
        ids = await asyncio.to_thread(rendered, worker.engine, turns)
        return await _answer(ChatShape(ask.model), worker, [ids], ask, ask.limit, http)

    @api.post("/v1/completions")
    async def completions(ask: CompletionAsk, http: Http) -> Response:
        worker = await served(http, ask.model)
        prompts = await asyncio.to_thread(
            lambda: [encoded(worker.engine, prompt) for prompt in ask.prompt]
        )
        echoes = []
        if ask.echo:
            echoes = [
                decoded(worker.engine, prompt) for prompt in ask.prompt for _ in range(ask.choices)
            ]
        shape = CompletionShape(ask.model, echoes=echoes)
        return await _answer(shape, worker, prompts, ask, ask.limit, http)

    def card(worker: Worker) -> dict[str, Any]:
        about = {"id": worker.name, "object": "model", "created": worker.created}
        about["owned_by"] = "herdbook"
        if worker.ready:
            about["context_length"] = worker.engine.most_tokens  # an extension: tokens
        return about

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(worker) for worker in herd.values()]}

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return card(herd.find(name))

    @api.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    tokenizing.add(api, herd, served)
    monitoring.add(api, herd, counts)
    return api


# -- replies --------------------------------------------------------------------------------


@dataclass
class ChatShape:
    """How a chat reply is written down."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    kind, chunk_kind, prompt_key = "chat.completion", "chat.completion.chunk", "messages"

    def whole(self, at: int, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self, at: int) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


@dataclass
class CompletionShape:
    """How a plain completion is written down. `echoes`: the prompt of each choice, if asked for."""

    model: str
    echoes: Sequence[str] = ()
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    kind, chunk_kind, prompt_key = "text_completion", "text_completion", "prompt"

    def whole(self, at: int, text: str) -> dict[str, Any]:
        return {"text": (self.echoes[at] if self.echoes else "") + text}

    def opening(self, at: int) -> dict[str, Any] | None:
        return {"text": self.echoes[at]} if self.echoes else None

    def part(self, text: str) -> dict[str, Any]:
        return {"text": text}


class Usage:
    """Tokens, counted as OpenAI does: a prompt once, however many choices it has."""

    def __init__(self, prompts: Sequence[Sequence[int]], choices: int) -> None:
        self._choices = choices
        self._prompt, self._reply, self._cached = sum(map(len, prompts)), 0, 0

    def add(self, at: int, piece: Piece) -> None:
        self._reply += len(piece.ids)
        if piece.reply is not None and at % self._choices == 0:
            self._cached += piece.reply.cached_tokens

    def __call__(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._reply,
            "total_tokens": self._prompt + self._reply,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


async def _answer(
    shape: ChatShape | CompletionShape,
    worker: Worker,
    prompts: Sequence[list[int]],
    ask: Ask,
    limit: int | None,
    http: Http,
) -> Response:
    """Run `ask.choices` requests for each prompt, and write the reply, streamed or whole."""
    requests: list[Request] = []
    tokenizer = worker.engine.tokenizer
    chat = isinstance(shape, ChatShape)
    stop = tokenizer.stop_strings if tokenizer and chat else ()
    for ids in prompts:
        tokens = budget(worker.engine, len(ids), limit, shape.prompt_key)
        for choice in range(ask.choices):
            sampling = ask.sampling(max_tokens=tokens, choice=choice)
            id = f"{shape.id}-{len(requests)}"
            requests.append(Request(ids, sampling, stop=stop, trim=chat, id=id))
    usage = visit_of(http.scope).usage = Usage(prompts, ask.choices)
    headers = {"X-Request-Id": shape.id}
    if ask.warnings:
        headers["X-Herdbook-Warning"] = ascii("; ".join(ask.warnings))[1:-1][:500]
    head = {"id": shape.id, "created": int(time.time()), "model": shape.model}
    if ask.stream:
        return EventStream(_events(shape, head, worker, requests, ask, usage), headers)
    body = await unless_gone(http.receive, _whole(shape, head, worker, requests, usage))
    if body is None:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(body, headers=headers)


async def _whole(
    shape: ChatShape | CompletionShape,
    head: dict[str, Any],
    worker: Worker,
    requests: Sequence[Request],
    usage: Usage,
) -> dict[str, Any]:
    texts = [""] * len(requests)
    ends: list[str | None] = [None] * len(requests)
    async with contextlib.aclosing(worker.stream(requests)) as pieces:
        async for at, piece in pieces:
            texts[at] += piece.text
            ends[at] = piece.finish
            usage.add(at, piece)
    choices = [
        {"index": at, **shape.whole(at, text), "logprobs": None, "finish_reason": end}
        for at, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]
    return {**head, "object": shape.kind, "choices": choices, "usage": usage()}


async def _events(
    shape: ChatShape | CompletionShape,
    head: dict[str, Any],
    worker: Worker,
    requests: Sequence[Request],
    ask: Ask,
    usage: Usage,
) -> AsyncGenerator[str, None]:
    """The lines of a stream: an opening, parts and an end for each choice; the sums; [DONE]."""
    options = ask.stream_options
    sums = bool(options and options.include_usage)
    always = bool(options and options.continuous_usage_stats)

    def chunk(choices: list[dict[str, Any]], with_usage: bool) -> str:
        body = {**head, "object": shape.chunk_kind, "choices": choices}
        if with_usage:
            body["usage"] = usage()
        elif sums:
            body["usage"] = None
        return data(body)

    def choice(at: int, content: dict[str, Any], end: str | None = None) -> str:
        one = {"index": at, **content, "logprobs": None, "finish_reason": end}
        return chunk([one], with_usage=always)

    opened: set[int] = set()
    async with contextlib.aclosing(worker.stream(requests)) as pieces:
        async for at, piece in pieces:
            usage.add(at, piece)
            if at not in opened:
                opened.add(at)
                if (opening := shape.opening(at)) is not None:
                    yield choice(at, opening)
            if piece.text:
                yield choice(at, shape.part(piece.text))
            if piece.finish is not None:
                yield choice(at, shape.part(""), piece.finish)
    if sums:
        yield chunk([], with_usage=True)
    yield "data: [DONE]\n\n"
