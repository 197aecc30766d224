"""Server-sent events, and work that ends when its client hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from herdbook.errors import HerdbookError
from herdbook.serving.problems import bug, problem
from herdbook.serving.visits import visit_of

T = TypeVar("T")

log = logging.getLogger("herdbook.serving")


def data(body: dict[str, Any]) -> str:
    """One event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(Response):
    """Server-sent events from a generator, which is closed as soon as the client has gone.

    Starlette's own streaming response notices that only at the next write, and leaves the generator
    to the garbage collector; here the engine's pages are free at once.

    An error before the first event keeps its own status; one after it comes as a last event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], headers: dict[str, str]) -> None:
        self.events = events
        self.status_code, self.background = 200, None
        self.init_headers({**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> bool:
            await self._write(scope, send)
            return True

        if await unless_gone(receive, write()) is None:
            visit_of(scope).gone = True

    async def _write(self, scope: Scope, send: Send) -> None:
        async with contextlib.aclosing(self.events) as events:
            first = await anext(events)  # an error here still gets its own status
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await send(_body(first))
            try:
                async for event in events:
                    await send(_body(event))
            except HerdbookError as error:
                visit_of(scope).status, body = problem(error)
                await send(_body(data(body)))
            except Exception as error:
                log.exception("a stream failed")
                visit_of(scope).status, body = bug(error)
                await send(_body(data(body)))
        usage = visit_of(scope).usage
        if usage is not None and b"x-herdbook-usage" in dict(scope["headers"]):
            await send(_body(f": usage {json.dumps(usage())}\n\n"))  # for the controller in front
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
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
