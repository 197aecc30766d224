"""`herd serve MODEL --workers N`: one door, N processes behind it.

    clients ── controller ──┬── worker 0    an ordinary server on a loopback port
                            ├── worker 1    (with --cluster on another machine: `on_ray`)
                            └── …

The controller keeps the keys, the limits and the log; it computes nothing. It starts the workers, and
they register by answering on the socket that it gave them with the secret that it told them on
stdin; nobody else can. One that dies or no longer answers is replaced. A request of which nothing has
been sent on yet then goes to another, as does one that a full worker refuses: its client hears of that
only when all of them do. A worker whose controller is gone ends itself.

A request goes to the worker that last saw a prompt beginning alike, whose cache then holds it, unless
that one is busier than the least busy by `SPREAD` requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response

from herdbook.errors import HerdbookError
from herdbook.serving import problems
from herdbook.serving.guard import Guard
from herdbook.serving.keyring import KeyRing
from herdbook.serving.monitoring import merged
from herdbook.serving.streaming import EventStream, data, unless_gone
from herdbook.serving.visits import Counts, Visits, visit_of
from herdbook.serving.worker import Busy, stopping

SPREAD = 4
WATCH_S = 2.0  # between two looks at a worker's health
DEAF_S = 30.0  # a worker that does not answer for so long is killed
SETTLE_S = 5.0  # so long may a worker take to tell what a client used that has left
MOST_DEATHS = 3  # in a row before it was ever ready: then the server gives up
PREFIX_CHARS = 1024
DEAD = (httpx.HTTPError, RuntimeError)  # the latter: the connections were closed meanwhile
FULL = ("overloaded", "server_stopping")  # a worker's refusals that another may not share
USAGE = b": usage "  # a comment at the end of a worker's stream, for the controller alone

log = logging.getLogger("herdbook.serving")


class Process(Protocol):
    """A worker as the cluster handles it, wherever it runs."""

    async def url(self) -> str | None:
        """Where it listens; None: it ends."""

    async def wait(self) -> object:
        """Until it has ended; how it did."""

    def terminate(self) -> None:
        """Ask it to end once it has answered what it has."""

    def kill(self) -> None:
        """End it at once."""


Spawn = Callable[[dict[str, Any]], Awaitable[Process]]  # of what a worker is told


@dataclass
class Member:
    """One worker process, or the place of the next."""

    number: int
    http: httpx.AsyncClient | None = None
    ready: bool = False
    open: int = 0
    process: Process | None = None
    prefixes: dict[int, None] = field(default_factory=dict)  # of prompts that it saw, latest last

    def saw(self, prefix: int) -> None:
        self.prefixes.pop(prefix, None)
        self.prefixes[prefix] = None
        if len(self.prefixes) > 4096:
            del self.prefixes[next(iter(self.prefixes))]


class Cluster:
    """Has workers started by `spawn`, watches and chooses them. settings: a `Setup` as a dict.
    deaf_s: a worker whose health is not heard of for so many seconds is killed."""

    def __init__(
        self,
        workers: int,
        names: Sequence[str],
        settings: dict[str, Any],
        spawn: Spawn,
        *,
        deaf_s: float = DEAF_S,
    ) -> None:
        self.names = list(names)
        self.settings, self.secret, self.spawn = settings, secrets.token_urlsafe(32), spawn
        self.deaf_s = deaf_s
        self.failure: str | None = None
        self._stopping = False
        self.members = [Member(number) for number in range(workers)]

    @property
    def healthy(self) -> bool:
        return any(member.ready for member in self.members)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Meanwhile the workers live."""
        keepers = [asyncio.create_task(self._keep(member)) for member in self.members]
        try:
            yield
        finally:
            self._stopping = True
            for member in self.members:
                if member.process is not None:
                    member.process.terminate()
            await asyncio.gather(*keepers)

    async def _keep(self, member: Member) -> None:
        """One worker after the other in this place."""
        deaths = 0
        while not self._stopping and deaths < MOST_DEATHS:
            process = await self.spawn({**self.settings, "secret": self.secret})
            member.process = process
            watching = asyncio.create_task(self._watch(member, process))
            ended = await process.wait()
            member.process = None
            deaths = 0 if member.ready else deaths + 1
            member.ready = False
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            member.prefixes.clear()
            if not self._stopping:
                log.warning("worker %d ended with %s", member.number, ended)
        if not self._stopping:
            self.failure = f"worker {member.number} died {deaths} times before it was ready"

    async def _watch(self, member: Member, process: Process) -> None:
        url = await process.url()
        if url is None:
            return
        async with httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(None, connect=5),
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {self.secret}"},
            trust_env=False,  # no proxy stands between us
        ) as member.http:
            heard = time.monotonic()
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    answer = await member.http.get("/health", timeout=self.deaf_s / 3)
                    member.ready, heard = answer.status_code == 200, time.monotonic()
                if member.ready and time.monotonic() - heard > self.deaf_s:
                    log.warning("worker %d does not answer and is replaced", member.number)
                    process.kill()
                await asyncio.sleep(WATCH_S if member.ready else 0.1)

    def choose(self, prefix: int, tried: Sequence[Member]) -> Member:
        """The worker for a prompt that begins so."""
        ready = [one for one in self.members if one.ready and one not in tried]
        if not ready:
            if self._stopping:
                raise stopping()
            raise Busy("no worker is ready", next="try again in a moment")
        least = min(one.open for one in ready)
        near = [one for one in ready if prefix in one.prefixes and one.open < least + SPREAD]
        chosen = min(near or ready, key=lambda one: one.open)
        chosen.saw(prefix)
        return chosen


class LocalProcess:
    """A worker on this machine."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process, self.wait = process, process.wait

    async def url(self) -> str | None:
        assert self._process.stdout is not None
        port = await self._process.stdout.readline()
        return f"http://127.0.0.1:{int(port)}" if port else None

    def terminate(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()


def local(workers: int) -> Spawn:
    """Starts workers that share this machine's cores."""
    cores = max(1, (os.cpu_count() or 1) // workers)

    async def spawn(told: dict[str, Any]) -> LocalProcess:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "herdbook.serving.member"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={"OMP_NUM_THREADS": str(cores), **os.environ},
            start_new_session=True,  # Ctrl-C is for the controller, which then stops the workers
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({**told, "host": "127.0.0.1"}).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # it died at once; its end tells
            await process.stdin.drain()
        return LocalProcess(process)

    return spawn


def app(cluster: Cluster, ring: KeyRing) -> FastAPI:
    """The door: everything but /health and /metrics is a worker's to answer."""
    counts = Counts()
    api = FastAPI(title="Herdbook", docs_url=None, redoc_url=None, openapi_url=None)
    api.add_middleware(Guard, ring=ring)
    api.add_middleware(Visits, counts=counts)
    problems.install(api, "")

    @api.get("/health")
    async def health() -> JSONResponse:
        workers = [{"ready": one.ready, "open_requests": one.open} for one in cluster.members]
        body = {"status": "ok" if cluster.healthy else "unavailable", "workers": workers}
        return JSONResponse(body, status_code=200 if cluster.healthy else 503)

    @api.get("/metrics")
    async def metrics() -> Response:
        pages = {}
        for member in cluster.members:
            if member.ready and member.http is not None:
                with contextlib.suppress(httpx.HTTPError):  # it has just died
                    pages[str(member.number)] = (await member.http.get("/metrics")).text
        return Response(merged(pages, counts), media_type="text/plain; version=0.0.4")

    @api.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(path: str, http: Http) -> Response:
        body = await http.body()
        forwarding = _Forwarding(cluster, http, body)
        answer = await unless_gone(http.receive, forwarding.begin())
        if answer is None:
            await forwarding.close()
            return Response(status_code=499)
        return answer

    return api


class _Forwarding:
    """One request on its way to a worker and back."""

    def __init__(self, cluster: Cluster, http: Http, body: bytes) -> None:
        self.cluster, self.http, self.body = cluster, http, body
        self.visit = visit_of(http.scope)
        self._name = self.visit.id  # the worker's own takes its place with the answer's head
        self._held = contextlib.AsyncExitStack()
        self._asked: Member | None = None  # while its answer has not come to its end
        # also when the client leaves before anybody reads the answer
        self.visit.held.callback(lambda: asyncio.ensure_future(self.close()))

    async def close(self) -> None:
        """Let go of the worker; if the client has left, learn what it used until then."""
        await self._held.aclose()
        member, self._asked = self._asked, None
        if member is not None and member.http is not None:
            with contextlib.suppress(*DEAD):
                answer = await member.http.get(f"/usage/{self._name}", timeout=SETTLE_S)
                usage = _about(answer.content)
                self.visit.usage = lambda: usage

    async def begin(self) -> Response:
        """The answer's head, or all of it if it is no stream; from another worker if one dies or is
        full."""
        tried: list[Member] = []
        full: Response | None = None  # of the refusals, the one that makes wait the least
        about = _about(self.body)
        model = about.get("model")
        self.visit.model = model if model in self.cluster.names else ""
        prefix = hash(str(about.get("messages", about.get("prompt")))[:PREFIX_CHARS])
        while True:
            try:
                member = self.cluster.choose(prefix, tried)
            except HerdbookError:
                if full is None:
                    raise
                return full
            tried.append(member)
            try:
                answer = await self._ask(member)
            except DEAD as error:
                self._asked = None
                await self.close()
                log.warning("worker %d: %s; the request goes on", member.number, error)
                continue
            if answer.status_code != 503 or _code(answer) not in FULL:
                return answer
            full = min(full or answer, answer, key=_wait_s)

    async def _ask(self, member: Member) -> Response:
        member.open += 1
        self._asked = member
        self._held.callback(self._let_go, member)
        assert member.http is not None
        sent = {"Content-Type": self.http.headers.get("content-type", "")}
        request = member.http.build_request(
            self.http.method,
            self.http.url.path,
            content=self.body,
            headers={**sent, "X-Herdbook-Usage": self._name},
        )
        answer = await member.http.send(request, stream=True)
        self._held.push_async_callback(answer.aclose)
        keep = ("x-request-id", "x-herdbook-warning", "retry-after", "content-type")
        headers = {name: answer.headers[name] for name in keep if name in answer.headers}
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            del headers["content-type"]
            parts = answer.aiter_raw()
            first = await anext(parts, b"")  # from here on the client has seen it
            return EventStream(self._events(member, first, parts), headers)
        content = await answer.aread()
        self._asked = None
        await self.close()
        usage = _about(content).get("usage")
        if usage:
            self.visit.usage = lambda: usage
        return Response(content, answer.status_code, headers)

    async def _events(
        self, member: Member, first: bytes, parts: AsyncIterator[bytes]
    ) -> AsyncGenerator[str, None]:
        try:
            rest = part = first
            while part:
                *events, rest = rest.split(b"\n\n")
                for event in events:
                    if event.startswith(USAGE):
                        usage = json.loads(event.removeprefix(USAGE))
                        self.visit.usage = lambda usage=usage: usage
                    else:
                        yield event.decode() + "\n\n"
                part = await anext(parts, b"")
                rest += part
            self._asked = None
        except DEAD as error:
            self._asked = None
            self.visit.status, body = (
                502,
                problems.shaped(502, f"worker {member.number} died: {error}", code="worker_died"),
            )
            yield data(body)
        finally:
            await self.close()

    @staticmethod
    def _let_go(member: Member) -> None:
        member.open -= 1


def _code(answer: Response) -> object:
    """What an error calls itself."""
    error = _about(bytes(answer.body)).get("error")
    return error.get("code") if isinstance(error, dict) else None


def _wait_s(answer: Response) -> int:
    return int(answer.headers["retry-after"])


def _about(body: bytes) -> dict[str, Any]:
    """A JSON object; {} for anything else, which a worker will refuse."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
