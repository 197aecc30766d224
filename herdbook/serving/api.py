"""OpenAI's API over our workers, as a FastAPI application.

    POST /v1/chat/completions   messages → the model's own template → reply
    POST /v1/completions        text or token ids → continuation
    POST /v1/embeddings         text or token ids → vector
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
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import HTMLResponse, JSONResponse, Response

from herdbook.engine.request import Request
from herdbook.serving import monitoring, problems, tokenizing
from herdbook.serving.embeddings import EmbeddingAsk, embed
from herdbook.serving.guard import Guard
from herdbook.serving.keyring import KeyRing
from herdbook.serving.models import Models
from herdbook.serving.prompts import budget, decoded, encoded, rendered
from herdbook.serving.replies import ChatShape, CompletionShape, Shape, Usage, parts, whole
from herdbook.serving.schema import Ask, ChatAsk, CompletionAsk
from herdbook.serving.streaming import EventStream, data, unless_gone
from herdbook.serving.visits import Counts, Visits, visit_of
from herdbook.serving.worker import Worker

PATHS = (
    "POST /v1/chat/completions, POST /v1/completions, POST /v1/embeddings, GET /v1/models, "
    "POST /tokenize, POST /detokenize, GET /health, GET /metrics, GET /"
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
        ids = await asyncio.to_thread(rendered, worker.engine, ask.messages, ask.callable)
        return await _answer(ChatShape(worker.engine, ask, ids), worker, ask, ask.limit, http)

    @api.post("/v1/completions")
    async def completions(ask: CompletionAsk, http: Http) -> Response:
        worker = await served(http, ask.model)
        prompts = await asyncio.to_thread(
            lambda: [encoded(worker.engine, prompt) for prompt in ask.prompt]
        )
        echoes = []
        if ask.echo:
            told = ask.told is not None  # then in the tokens' own spelling
            echoes = [
                decoded(worker.engine, prompt, ids if told else None)
                for prompt, ids in zip(ask.prompt, prompts, strict=True)
            ]
        shape = CompletionShape(worker.engine, ask, prompts, echoes)
        return await _answer(shape, worker, ask, ask.limit, http)

    @api.post("/v1/embeddings")
    async def embeddings(ask: EmbeddingAsk, http: Http) -> Response:
        worker = await served(http, ask.model)
        texts = await asyncio.to_thread(
            lambda: [encoded(worker.engine, text, "input") for text in ask.input]
        )
        tokens = sum(map(len, texts))
        counts = {"prompt_tokens": tokens, "total_tokens": tokens}
        visit_of(http.scope).usage = lambda: counts
        work = embed(ask, worker, texts, _adapter(worker, ask))
        body = await unless_gone(http.receive, work)
        if body is None:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(body | {"usage": counts})

    def card(name: str, worker: Worker) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": worker.created}
        about["owned_by"] = "herdbook"
        if name in worker.adapters:
            about["parent"] = worker.name  # as with vLLM: this is an adapter of that model
        if worker.ready:
            about["context_length"] = worker.engine.most_tokens  # an extension: tokens
        return about

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(*one) for one in herd.named.items()]}

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return card(name, herd.find(name))

    @api.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    tokenizing.add(api, herd, served)
    monitoring.add(api, herd, counts)
    return api


def _adapter(worker: Worker, ask: Ask | EmbeddingAsk) -> str | None:
    """Which adapter a request means by the model that it names."""
    return ask.model if ask.model in worker.adapters else None


# -- replies --------------------------------------------------------------------------------


async def _answer(
    shape: Shape, worker: Worker, ask: Ask, limit: int | None, http: Http
) -> Response:
    """Run `ask.draws` requests for each prompt, and write the reply, streamed or whole."""
    requests: list[Request] = []
    tokenizer = worker.engine.tokenizer
    chat = isinstance(shape, ChatShape)
    stop = tokenizer.stop_strings if tokenizer and chat else ()
    for ids in shape.prompts:
        tokens = budget(worker.engine, len(ids), limit, shape.prompt_key)
        for choice in range(ask.draws):
            sampling = ask.sampling(max_tokens=max(1, tokens), choice=choice)
            id = f"{shape.id}-{len(requests)}"
            trim = chat and sampling.grammar is None
            adapter = _adapter(worker, ask)
            requests.append(
                Request(
                    ids,
                    sampling,
                    stop=stop,
                    trim=trim,
                    priority=ask.priority or 0,
                    id=id,
                    prompt_only=not tokens,
                    adapter=adapter,
                )
            )
    # A grammar is read here, in a thread of its own, and found ready by the engine.
    await asyncio.to_thread(worker.engine.intake.matcher, requests[0].sampling)
    usage = visit_of(http.scope).usage = Usage(shape.prompts, ask.draws)
    headers = {"X-Request-Id": shape.id}
    if ask.warnings:
        headers["X-Herdbook-Warning"] = ascii("; ".join(ask.warnings))[1:-1][:500]
    pieces = worker.stream(requests)
    if ask.stream:
        return EventStream(_lines(parts(shape, pieces, len(requests), usage), pieces), headers)

    async def work() -> dict[str, Any]:
        async with contextlib.aclosing(pieces):
            return await whole(shape, pieces, len(requests), usage)

    body = await unless_gone(http.receive, work())
    if body is None:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(body, headers=headers)


async def _lines(
    bodies: AsyncIterator[dict[str, Any]], pieces: AsyncGenerator[Any, None]
) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(pieces):
        async for body in bodies:
            yield data(body)
    yield "data: [DONE]\n\n"
