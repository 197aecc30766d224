"""`herd serve`: load models, listen, answer, stop cleanly.

Order matters to whoever waits at the terminal: names, sizes, key and port are checked in the first
moments, before a model is loaded. Then the server listens at once, and /health says 503 until the
models, each loaded in its worker's thread, are ready. With a budget of memory or an idle time they are
loaded when they are asked for (`models`).

SIGTERM and Ctrl-C stop it gracefully: no new requests, running replies may finish within `STOP_S`
seconds, the rest ends with an error that says so. A second Ctrl-C does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict

import uvicorn
from fastapi import FastAPI

from herdbook.book.book import Book
from herdbook.book.keys import Keys
from herdbook.engine.loading import CacheType, Device
from herdbook.errors import ServeError
from herdbook.model.references import may_be_name
from herdbook.serving import on_ray
from herdbook.serving.api import app
from herdbook.serving.cluster import Cluster, local
from herdbook.serving.cluster import app as cluster_app
from herdbook.serving.guard import LOCAL_NAMES
from herdbook.serving.keyring import KeyRing
from herdbook.serving.models import Models
from herdbook.serving.setup import Setup, served_name
from herdbook.serving.worker import STOP_S
from herdbook.tokens import templates


def serve(
    refs: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    template: str | None = None,
    adapters: Mapping[str, str] | None = None,
    book: Book | None = None,
    memory_bytes: int | None = None,
    idle_s: float | None = None,
    workers: int = 1,
    cluster: bool = False,
    cache: CacheType | None = None,
    speculate: bool = False,
    device: Device | None = None,
) -> None:
    """Serve the models over OpenAI's API until Ctrl-C. Port 0 takes a free one.

    host: this machine only by default; any other address needs a `key` or keys in the book, which
    clients send as `Authorization: Bearer KEY`. template: a chat template in place of the models' own,
    by its name or its file. adapters: name → reference; clients choose one as if it were a model. They
    sit on the one model that is served. memory_bytes, idle_s: load models when they are asked for, and
    unload them to stay within the budget or when they were idle for so long. workers: so many
    processes, each with the models and its share of the budget, behind one door (`cluster`).
    cluster: spread them over the machines of the Ray cluster at RAY_ADDRESS, each with the whole
    budget (`on_ray`). cache, speculate: of the engines, see `Engine`. device: see `load`.
    """
    adapters = adapters or {}
    if adapters and len(refs) != 1:
        raise ServeError(
            f"{len(refs)} models with adapters",
            rule="leave open which of them the adapters belong to",
            next="serve the adapters' base alone",
        )
    names = [served_name(ref) for ref in refs]
    known = [*names, *adapters]
    twice = next((name for name in known if known.count(name) > 1), None)
    if twice is not None:
        raise ServeError(f"two models would be called {twice!r}", next="serve one of them")
    if book is None and (any(may_be_name(ref) for ref in refs) or Book.exists()):
        book = Book()
    ring = KeyRing(key, Keys(book) if book else None)
    if host not in LOCAL_NAMES and not ring.needed:
        raise ServeError(
            f"host {host!r}",
            rule="is reachable from other machines, and there is no API key",
            next="make one: herd keys add NAME (or give --key, or set HERDBOOK_API_KEY), or leave "
            "--host out",
        )
    if template:
        templates.read(template)
    if workers < 1:
        raise ServeError(f"--workers {workers}", rule="must be at least 1", next="leave it out")
    share = None if memory_bytes is None else memory_bytes // (1 if cluster else workers)
    ours = [*map(str, refs)]
    setup = Setup(ours, template, dict(adapters), share, idle_s, cache, speculate, device)
    models = setup.models(book)
    _log_requests()
    with contextlib.ExitStack() as held:
        listener = held.enter_context(listen(host, port))
        place = f"[{host}]" if ":" in host else host
        url = f"http://{place}:{listener.getsockname()[1]}"
        spawn = held.enter_context(on_ray.connected(workers)) if cluster else local(workers)
        # Uvicorn raises the signal again once it has stopped; stopping is what was asked for.
        held.enter_context(_stoppable())
        if workers == 1 and not cluster:
            asyncio.run(_run(models, listener, ring, url))
        else:
            door = Cluster(workers, known, asdict(setup), spawn)
            asyncio.run(_run_cluster(door, listener, ring, url))


def serve_member(setup: Setup, secret: str, host: str) -> None:
    """One worker of a cluster: the same server for who knows the secret. Its port goes to stdout."""
    named = any(may_be_name(ref) for ref in (*setup.refs, *setup.adapters.values()))
    models = setup.models(Book() if named else None)
    with listen(host, 0) as listener, _stoppable():
        print(listener.getsockname()[1], flush=True)
        asyncio.run(_run(models, listener, KeyRing(secret), None))


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM as Ctrl-C, and neither an error."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        yield


def _log_requests() -> None:
    """One line a request on stderr, without its contents."""
    log, out = logging.getLogger("herdbook.requests"), logging.StreamHandler()
    out.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers, log.propagate = [out], False
    log.setLevel(logging.INFO)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or a ServeError that says what to do."""
    if not 0 <= port <= 65535:  # the system would take what is left of it beyond 16 bits
        raise ServeError(
            f"port {port}", rule="is none: ports go to 65535", next="--port 8000, or 0 for any"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ServeError(
            f"host {host!r}", rule=f"is no address here: {error.strerror}", next="use 127.0.0.1"
        ) from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"port {port} on {host}",
            rule=f"cannot be opened: {error.strerror}",
            next=f"choose another: --port {port + 1 if port < 65535 else 8000}, or 0 for any",
        ) from error
    return listener


class _Server(uvicorn.Server):
    """Tells the workers to stop as soon as it no longer listens, and waits for their last words."""

    def __init__(self, config: uvicorn.Config, models: Models) -> None:
        super().__init__(config)
        self.models = models

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.create_task(self.models.stop(STOP_S))
        await super().shutdown(sockets)
        if not self.force_exit:
            await stopping


async def _run(models: Models, listener: socket.socket, ring: KeyRing, url: str | None) -> None:
    """url: what is told to whoever waits at the terminal; None: nobody does."""
    api = app(models, ring=ring)

    @contextlib.asynccontextmanager
    async def life(api: FastAPI) -> AsyncIterator[None]:
        models.start()
        async with models.sweeping():
            yield

    api.router.lifespan_context = life
    server = _Server(_config(api), models)
    announcing = asyncio.create_task(_announce(models, url, ring.needed, server))
    try:
        await server.serve(sockets=[listener])
        if not models.on_demand:
            failure = next((w.failure for w in models.values() if w.failure), None)
            if failure is not None:
                raise failure
    finally:
        announcing.cancel()


def _config(api: FastAPI) -> uvicorn.Config:
    grace = int(STOP_S) + 5
    return uvicorn.Config(
        api, log_level="warning", access_log=False, timeout_graceful_shutdown=grace
    )


async def _announce(
    models: Models, url: str | None, with_key: bool, server: uvicorn.Server
) -> None:
    """Say how to call the server once all models are there; stop it when one cannot be loaded."""
    if url is not None and not models.on_demand:
        _tell(f"loading {', '.join(models)} …")
    while not models.healthy:
        if any(worker.failure for worker in models.values()):
            server.should_exit = True
            return
        await asyncio.sleep(0.05)
    if url is not None:
        _tell(how_to_call(url, next(iter(models)), with_key))


def _tell(text: str) -> None:
    """On stderr, unwrapped: what it shows is meant to be copied."""
    print(text, file=sys.stderr, flush=True)


async def _run_cluster(cluster: Cluster, listener: socket.socket, ring: KeyRing, url: str) -> None:
    api = cluster_app(cluster, ring)

    @contextlib.asynccontextmanager
    async def life(api: FastAPI) -> AsyncIterator[None]:
        async with cluster.running():
            yield

    api.router.lifespan_context = life
    server = uvicorn.Server(_config(api))

    async def announce() -> None:
        _tell(f"starting workers: {len(cluster.members)} …")
        while not all(member.ready for member in cluster.members) and not cluster.failure:
            await asyncio.sleep(0.05)
        if not cluster.failure:
            _tell(how_to_call(url, cluster.names[0], ring.needed))
        while not cluster.failure:
            await asyncio.sleep(1)
        server.should_exit = True

    announcing = asyncio.create_task(announce())
    try:
        await server.serve(sockets=[listener])
        if cluster.failure:
            raise ServeError(
                cluster.failure, next="its message stands above; try one process: herd serve MODEL"
            )
    finally:
        announcing.cancel()


def how_to_call(url: str, model: str, with_key: bool) -> str:
    """What is printed when the server is ready."""
    header = ' -H "Authorization: Bearer $HERDBOOK_API_KEY"' if with_key else ""
    key = 'os.environ["HERDBOOK_API_KEY"]' if with_key else '"none"'
    imports = "import os, openai" if with_key else "import openai"
    return f"""\
ready: {url} serves {model!r} (Ctrl-C stops)

  chat page    {url}/
  curl         curl {url}/v1/chat/completions -H "Content-Type: application/json"{header} \\
                 -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hi"}}]}}'
  python       {imports}
               client = openai.OpenAI(base_url="{url}/v1", api_key={key})
               reply = client.chat.completions.create(
                   model="{model}", messages=[{{"role": "user", "content": "Hi"}}])
               print(reply.choices[0].message.content)
"""
