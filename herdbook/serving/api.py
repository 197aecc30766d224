"""OpenAI's API over our workers, as a FastAPI application.

    POST /v1/chat/completions   messages → the model's own template → reply
    POST /v1/completions        text or token ids → continuation
    POST /v1/embeddings         text or token ids → vector
    GET  /v1/models             what is served
    GET  /health                200 when all models are loaded, 503 before
    GET  /                      a small chat page

What a reply is made of is decided elsewhere: `tokens.chat.render` turns messages into ids (the same
call as in training, so the model sees what it was trained on), the engine turns ids into pieces.
This file only translates. It never truncates: a prompt that does not fit the context is refused
with the numbers. A reply without `max_tokens` may fill the context (a plain completion: 16 tokens,
as with OpenAI); without `temperature` it is greedy (why: `Ask.sampling`).

Every error, of whatever origin, is a JSON object in OpenAI's shape:

    {"error": {"message": "…", "type": "invalid_request_error", "param": "n", "code": null}}

An error before the first token has its proper status, streamed or not: the status line waits for
the first piece. One after it comes as a last `data:` line in this shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request
from herdbook.errors import CapacityError, HerdbookError, RequestError, ServeError
from herdbook.serving.embeddings import EmbeddingAsk, embed
from herdbook.serving.replies import ChatShape, CompletionShape, Shape, Usage, parts, whole
from herdbook.serving.schema import Ask, ChatAsk, CompletionAsk, Prompt, explain
from herdbook.serving.tools import explained, native
from herdbook.serving.worker import Broken, Busy, Worker
from herdbook.tokens.chat import render

MAX_BODY_BYTES = 4 * 2**20
LOCAL_NAMES = frozenset(["localhost", "127.0.0.1", "::1"])
PATHS = (
    "POST /v1/chat/completions, POST /v1/completions, POST /v1/embeddings, GET /v1/models, "
    "GET /health, GET /"
)
T = TypeVar("T")


class Refusal(RequestError):
    """A request error that knows its HTTP status, OpenAI's code, and the key that it is about."""

    def __init__(
        self,
        status: int,
        what: str,
        *,
        code: str | None = None,
        param: str | None = None,
        rule: str = "",
        next: str = "",
    ) -> None:
        super().__init__(what, rule=rule, next=next)
        self.status, self.code, self.param = status, code, param


def app(models: Mapping[str, Worker], *, key: str | None = None) -> FastAPI:
    """The application over started workers. With `key`, /v1/… wants `Authorization: Bearer key`.

    It neither starts nor stops the workers: who made them does.
    """
    api = FastAPI(title="Herdbook", docs_url=None, redoc_url=None)
    api.add_middleware(Guard, key=key)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(StarletteHTTPException, _http_error)
    api.add_exception_handler(HerdbookError, _user_error)
    api.add_exception_handler(Exception, _bug)

    by_name = {**models} | {name: one for one in models.values() for name in one.adapters}

    def served(name: str) -> Worker:
        if name not in by_name:
            raise Refusal(
                404,
                f"the model {name!r}",
                rule="is not served here",
                next="served are: " + ", ".join(repr(known) for known in by_name),
                code="model_not_found",
                param="model",
            )
        worker = by_name[name]
        if worker.failure is not None:
            raise Refusal(503, f"{name} failed to load: {worker.failure}", code="model_failed")
        if not worker.ready:
            raise Refusal(
                503, name, rule="is still loading", next="try again soon", code="model_loading"
            )
        return worker

    @api.post("/v1/chat/completions")
    async def chat_completions(ask: ChatAsk, http: Http) -> Response:
        worker = served(ask.model)
        ids = await asyncio.to_thread(_rendered, worker.engine, ask)
        return await _answer(ChatShape(worker.engine, ask, ids), worker, ask, ask.limit, http)

    @api.post("/v1/completions")
    async def completions(ask: CompletionAsk, http: Http) -> Response:
        worker = served(ask.model)
        prompts = await asyncio.to_thread(
            lambda: [_encoded(worker.engine, prompt) for prompt in ask.prompt]
        )
        echoes = []
        if ask.echo:
            told = ask.told is not None  # then in the tokens' own spelling
            echoes = [
                _echo(worker.engine, prompt, ids if told else None)
                for prompt, ids in zip(ask.prompt, prompts, strict=True)
            ]
        shape = CompletionShape(worker.engine, ask, prompts, echoes)
        return await _answer(shape, worker, ask, ask.limit, http)

    @api.post("/v1/embeddings")
    async def embeddings(ask: EmbeddingAsk, http: Http) -> Response:
        worker = served(ask.model)
        texts = await asyncio.to_thread(
            lambda: [_encoded(worker.engine, text) for text in ask.input]
        )
        body = await _unless_gone(http.receive, embed(ask, worker, texts, _adapter(worker, ask)))
        return Response(status_code=499) if body is None else JSONResponse(body)

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
        return {"object": "list", "data": [card(*one) for one in by_name.items()]}

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return card(name, served(name))

    @api.get("/health")
    async def health() -> JSONResponse:
        states = {
            name: {
                "status": "failed" if w.failure else "ready" if w.ready else "loading",
                "open_requests": w.open,
            }
            for name, w in models.items()
        }
        ok = all(state["status"] == "ready" for state in states.values())
        body = {"status": "ok" if ok else "unavailable", "models": states}
        return JSONResponse(body, status_code=200 if ok else 503)

    @api.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    return api


# -- prompts --------------------------------------------------------------------------------


def _rendered(engine: Engine, ask: ChatAsk) -> list[int]:
    if engine.tokenizer is None:
        raise _no_tokenizer()
    rows = [turn.row() for turn in ask.messages]
    tools = [tool.model_dump(exclude_unset=True) for tool in ask.callable]
    if not native(engine.tokenizer.chat_template):
        rows, tools = explained(rows, tools), []
    return render(engine.tokenizer, rows, reply=True, tools=tools, now=datetime.now()).ids


def _adapter(worker: Worker, ask: Ask | EmbeddingAsk) -> str | None:
    """Which adapter a request means by the model that it names."""
    return ask.model if ask.model in worker.adapters else None


def _encoded(engine: Engine, prompt: Prompt) -> list[int]:
    if not isinstance(prompt, str):
        for id in prompt:
            if not 0 <= id < engine.intake.vocab:
                raise Refusal(
                    400,
                    f"token id {id}",
                    rule=f"is outside the vocabulary of {engine.intake.vocab} tokens",
                    next="encode the prompt with this model's own tokenizer",
                    param="prompt",
                )
        return prompt
    if engine.tokenizer is None:
        raise _no_tokenizer()
    return engine.tokenizer.prompt(prompt)


def _echo(engine: Engine, prompt: Prompt, ids: list[int] | None) -> str:
    """The prompt as it was sent, or as its tokens `ids` spell it."""
    if isinstance(prompt, str) and ids is None:
        return prompt
    if engine.tokenizer is None:
        raise _no_tokenizer()
    specials = not isinstance(prompt, str)
    return engine.tokenizer.decode(prompt if ids is None else ids, specials=specials)  # type: ignore[arg-type]


def _no_tokenizer() -> Refusal:
    return Refusal(
        400,
        "this model came without a tokenizer",
        next="send token ids to /v1/completions, or serve a folder with tokenizer.json",
    )


def _budget(engine: Engine, prompt: int, limit: int | None, param: str) -> int:
    """How many tokens the reply may have; refuses what does not fit instead of cutting it."""
    room = engine.most_tokens - prompt
    if room < 1 or (limit is not None and limit > room):
        asked = "" if limit is None else f" and {limit} of reply"
        raise Refusal(
            400,
            f"{prompt} tokens of prompt{asked}",
            rule=f"do not fit the context of {engine.most_tokens} tokens",
            next="shorten the prompt" if room < 1 else f"ask for at most {room} tokens of reply",
            code="context_length_exceeded",
            param=param,
        )
    return room if limit is None else limit


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
        tokens = _budget(worker.engine, len(ids), limit, shape.prompt_key)
        for choice in range(ask.draws):
            sampling = ask.sampling(max_tokens=tokens, choice=choice)
            id = f"{shape.id}-{len(requests)}"
            trim = chat and sampling.grammar is None
            adapter = _adapter(worker, ask)
            requests.append(Request(ids, sampling, stop=stop, trim=trim, id=id, adapter=adapter))
    # A grammar is read here, in a thread of its own, and found ready by the engine.
    await asyncio.to_thread(worker.engine.intake.matcher, requests[0].sampling)
    usage = Usage(shape.prompts, ask.draws)
    headers = {"X-Request-Id": shape.id}
    if ask.warnings:
        headers["X-Herdbook-Warning"] = ascii("; ".join(ask.warnings))[1:-1][:500]
    pieces = worker.stream(requests)
    if ask.stream:
        return EventStream(_lines(parts(shape, pieces, len(requests), usage), pieces), headers)

    async def work() -> dict[str, Any]:
        async with contextlib.aclosing(pieces):
            return await whole(shape, pieces, len(requests), usage)

    body = await _unless_gone(http.receive, work())
    if body is None:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(body, headers=headers)


async def _lines(
    bodies: AsyncIterator[dict[str, Any]], pieces: AsyncGenerator[Any, None]
) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(pieces):
        async for body in bodies:
            yield _data(body)
    yield "data: [DONE]\n\n"


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(Response):
    """Server-sent events from a generator, which is closed as soon as the client has gone.

    Starlette's own streaming response notices that only at the next write, and leaves the generator
    to the garbage collector; here the engine's pages are free at once.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        self.events = events
        self.status_code, self.background = 200, None
        self.init_headers({**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            first = await anext(events)  # an error here still gets its own status
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await send(_body(first))
            try:
                async for event in events:
                    await send(_body(event))
            except HerdbookError as error:
                _, body = _problem(error)
                await send(_body(_data(body)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; or None, and `work` cancelled, when the client hangs up first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:  # also when the server itself cancels us
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


# -- errors ---------------------------------------------------------------------------------


def _problem(error: HerdbookError) -> tuple[int, dict[str, Any]]:
    """A user error → (status, body in OpenAI's shape)."""
    message = f"{error.what} {error.rule}".strip()
    message = f"{message}; {error.next}" if error.next else message
    match error:
        case Refusal():
            return error.status, _shaped(error.status, message, error.param, error.code)
        case Busy():
            return 503, _shaped(503, message, code="overloaded")
        case ServeError():
            return 503, _shaped(503, message, code="server_stopping")
        case Broken():
            return 500, _shaped(500, message, code="engine_failed")
        case CapacityError():
            return 400, _shaped(400, message, code="context_length_exceeded")
        case _:
            return 400, _shaped(400, message)


def _shaped(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _user_error(http: Http, error: Exception) -> Response:
    assert isinstance(error, HerdbookError)
    status, body = _problem(error)
    return JSONResponse(body, status, headers={"Retry-After": "2"} if status == 503 else None)


def _invalid(http: Http, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = explain(error.errors())
    return JSONResponse(_shaped(400, message, param), 400)


def _http_error(http: Http, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    where = ascii(http.url.path)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"there is no {where} here; there are: {PATHS}", "not_found"
    elif error.status_code == 405:
        message = f"{http.method} is not allowed for {where}; there are: {PATHS}"
        code = "method_not_allowed"
    elif error.status_code == 400:  # FastAPI could not even decode the body
        message = "the body could not be read as JSON in UTF-8"
    body = _shaped(error.status_code, message, code=code)
    return JSONResponse(body, error.status_code, headers=error.headers)


def _bug(http: Http, error: Exception) -> Response:
    message = f"the server failed: {type(error).__name__}; its log has the details"
    return JSONResponse(_shaped(500, message, code="internal_error"), 500)


class Guard:
    """Before anything is parsed: the key, the host, and the size of the body.

    Without a key the server is for this machine only. Then the Host header must be a local name:
    else a web page from elsewhere could reach it by pointing its own domain name at 127.0.0.1.
    """

    def __init__(
        self, app: ASGIApp, key: str | None = None, max_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self.app, self.key, self.max_bytes = app, key, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        http = Http(scope)
        refused = self._refuse(http)
        if refused is not None:
            return await refused(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise HTTPException(413, self._too_large(f"more than {self.max_bytes}"))
            return message

        await self.app(scope, counted, send)

    def _refuse(self, http: Http) -> Response | None:
        if self.key is None:
            if http.url.hostname not in LOCAL_NAMES:
                message = f"Host {http.url.hostname!a} is not this machine's; use 127.0.0.1"
                return JSONResponse(_shaped(403, message, code="wrong_host"), 403)
        elif http.url.path.startswith("/v1"):
            scheme, _, given = http.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self.key.encode())
            if scheme.lower() != "bearer" or not right:
                message = (
                    "a wrong API key" if given else "no API key; send 'Authorization: Bearer <key>'"
                )
                headers = {"WWW-Authenticate": "Bearer"}
                return JSONResponse(_shaped(401, message, code="invalid_api_key"), 401, headers)
        length = http.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_bytes:
            close = {"Connection": "close"}
            return JSONResponse(_shaped(413, self._too_large(length)), 413, close)
        return None

    def _too_large(self, size: str) -> str:
        return f"a body of {size} bytes is too large; at most {self.max_bytes} are read"
