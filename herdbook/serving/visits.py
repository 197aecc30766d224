"""Each HTTP request is a visit: what it asked for, how it ended, one line in the log, no contents.

    id=chatcmpl-5f… model=cria key=alice in=12 out=34 cached=8 ms=512 status=200 outcome=ok

The log `herdbook.requests` gets that line, `Counts` the same in numbers for /metrics. What a visit
holds (its model, which must not be unloaded meanwhile) is let go when it ends, whatever happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from herdbook.serving.metrics import Histogram

if TYPE_CHECKING:
    from herdbook.serving.keyring import Pass

QUIET = ("/", "/health", "/metrics")  # asked every few seconds by machines
MOST_SENT = 1024  # visits of a controller whose usage is kept for it

log = logging.getLogger("herdbook.requests")


@dataclass
class Visit:
    """One HTTP request on its way through the server."""

    id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    model: str = ""  # as served; "" until it is found
    key: Pass | None = None  # whose key was shown
    status: int = 0  # 0: nothing was sent
    gone: bool = False  # the client hung up
    usage: Callable[[], dict[str, Any]] | None = (
        None  # OpenAI's counts of tokens, once there are any
    )
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    begun: float = field(default_factory=time.perf_counter)

    @property
    def tokens(self) -> tuple[int, int, int]:
        """(of the prompt, of the reply, of the prompt from the cache), as far as they were computed."""
        counts = self.usage() if self.usage else {}
        asked, said = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
        cached = counts.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return (asked, said, cached) if said or self.outcome in ("ok", "gone") else (0, 0, 0)

    @property
    def outcome(self) -> str:
        """ok, gone (the client left), limited (429), busy (503), refused (4xx) or failed (5xx)."""
        if self.gone or self.status in (0, 499):
            return "gone"
        if self.status < 400:
            return "ok"
        if self.status < 500:
            return "limited" if self.status == 429 else "refused"
        return "busy" if self.status == 503 else "failed"


class Counts:
    """Visits in numbers: by model and outcome, by key and outcome, the tokens of each key, and how
    long they took in seconds."""

    def __init__(self) -> None:
        self.visits: Counter[tuple[str, str]] = Counter()
        self.keys: Counter[tuple[str, str]] = Counter()
        self.key_tokens: Counter[str] = Counter()
        #: what visits used that a controller sends: known when they have ended; the latest ones
        self.sent: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.seconds = Histogram((0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300))


def visit_of(scope: Scope) -> Visit:
    visit: Visit = scope["herdbook.visit"]
    return visit


class Visits:
    """The outermost layer of the application: begins and ends each visit."""

    def __init__(self, app: ASGIApp, counts: Counts) -> None:
        self.app, self.counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (
            scope["method"] == "HEAD"
        ):  # a GET whose body the server, which has its own scope, leaves out
            scope = {**scope, "method": "GET"}
        visit = scope["herdbook.visit"] = Visit()
        used: asyncio.Future[dict[str, Any]] = asyncio.Future()
        if name := dict(scope["headers"]).get(b"x-herdbook-usage"):
            self.counts.sent[name.decode("latin-1")] = used
            if len(self.counts.sent) > MOST_SENT:
                del self.counts.sent[next(iter(self.counts.sent))]

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                names = dict(message["headers"])
                if b"x-request-id" in names:
                    visit.id = names[b"x-request-id"].decode("latin-1")
                else:
                    message["headers"] = [
                        *message["headers"],
                        (b"x-request-id", visit.id.encode()),
                    ]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            visit.held.close()
            used.set_result(visit.usage() if visit.usage else {})
            self._ended(visit, scope["path"])

    def _ended(self, visit: Visit, path: str) -> None:
        asked, said, cached = visit.tokens
        if visit.key is not None:
            visit.key.used(asked + said)
        if path in QUIET:
            return
        if visit.key is not None:
            self.counts.keys[visit.key.name, visit.outcome] += 1
            self.counts.key_tokens[visit.key.name] += asked + said
        seconds = time.perf_counter() - visit.begun
        self.counts.visits[visit.model, visit.outcome] += 1
        self.counts.seconds.observe(seconds)
        name = visit.key.name if visit.key else "-"
        log.info(
            "id=%s model=%s key=%s in=%d out=%d cached=%d ms=%.0f status=%d outcome=%s",
            *(visit.id, visit.model or "-", name, asked, said, cached),
            *(1000 * seconds, visit.status, visit.outcome),
        )
