"""Before anything is parsed: the key and its limits, the host, and the size of the body.

Without a key the server is for this machine only. Then the Host header must be a local name, written
as it should be: else a web page from elsewhere could reach it by pointing its own domain name at
127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import re

from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from herdbook.errors import HerdbookError
from herdbook.serving.keyring import KeyRing
from herdbook.serving.problems import refused, shaped
from herdbook.serving.visits import visit_of

MAX_BODY_BYTES = 4 * 2**20
LOCAL_NAMES = frozenset(["localhost", "127.0.0.1", "::1"])
LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
PUBLIC = frozenset(["/", "/health"])  # need no key: the page asks for one, and says nothing itself


class Guard:
    """Refuses what must not come in; what comes in has its key noted in the visit."""

    def __init__(self, app: ASGIApp, ring: KeyRing, max_bytes: int = MAX_BODY_BYTES) -> None:
        self.app, self.ring, self.max_bytes = app, ring, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            answer = await self._open(scope, headers) or self._size(headers)
        except HerdbookError as error:  # a limit, or a book that cannot be read
            answer = refused(error)
        key, read = visit_of(scope).key, 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise HTTPException(413, self._too_large(f"more than {self.max_bytes}"))
            return message

        async def limits(message: Message) -> None:
            if key is not None and message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(key.headers())
            await send(message)

        await (answer or self.app)(scope, counted, limits)

    async def _open(self, scope: Scope, headers: Headers) -> Response | None:
        """None where the request may come in."""
        await self.ring.look()
        if not self.ring.needed:
            hosts = headers.getlist("host")
            if len(hosts) != 1 or not LOCAL_HOST.fullmatch(hosts[0]):
                message = f"Host {', '.join(hosts)!a} is not this machine's; use 127.0.0.1"
                return JSONResponse(shaped(403, message, code="wrong_host"), 403)
            return None
        if scope["path"] in PUBLIC:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = await self.ring.find(given.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            message = (
                "a wrong API key" if given else "no API key; send 'Authorization: Bearer <key>'"
            )
            told = {"WWW-Authenticate": "Bearer"}
            return JSONResponse(shaped(401, message, code="invalid_api_key"), 401, told)
        visit_of(scope).key = found
        if scope["method"] == "POST":
            found.begin()
        return None

    def _size(self, headers: Headers) -> Response | None:
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_bytes:
            close = {"Connection": "close"}
            return JSONResponse(shaped(413, self._too_large(length)), 413, close)
        return None

    def _too_large(self, size: str) -> str:
        return f"a body of {size} bytes is too large; at most {self.max_bytes} are read"
