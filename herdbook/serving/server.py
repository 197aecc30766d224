"""`herd serve`: load models, listen, answer, stop cleanly.

Order matters to whoever waits at the terminal: names, key and port are checked in the first
moments, before a model is loaded. Then the server listens at once, and /health says 503 until the
models, each loaded in its worker's thread, are ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from rich.console import Console

from herdbook.book.book import Book
from herdbook.engine.engine import Engine
from herdbook.engine.loaded import adapter_folder, load
from herdbook.errors import ServeError
from herdbook.model.references import may_be_name, resolve
from herdbook.serving.api import LOCAL_NAMES, app
from herdbook.serving.worker import STOP_S, Worker
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
) -> None:
    """Serve the models over OpenAI's API until Ctrl-C. Port 0 takes a free one.

    host: this machine only by default; any other address needs a `key`, which clients send as
    `Authorization: Bearer KEY`. template: a chat template in place of the models' own, by its name or
    its file. adapters: name → reference; clients choose one as if it were a model. They sit on the one
    model that is served.
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
    if host not in LOCAL_NAMES and not key:
        raise ServeError(
            f"host {host!r}",
            rule="is reachable from other machines, and there is no API key",
            next="give --key, or set HERDBOOK_API_KEY, or leave --host out",
        )
    if book is None and any(may_be_name(ref) for ref in (*refs, *adapters.values())):
        book = Book()
    for ref in refs:
        resolve(ref, book)  # an unknown name is told before anything is opened
    folders = {name: adapter_folder(ref, book) for name, ref in adapters.items()}
    if template:
        templates.read(template)
    with listen(host, port) as listener:
        workers = {
            name: Worker(name, partial(_engine, ref, book, template, folders), adapters=[*folders])
            for name, ref in zip(names, refs, strict=True)
        }
        # Uvicorn raises Ctrl-C again once it has stopped; stopping is what was asked for.
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_run(workers, listener, host, key))


def named(adapters: Sequence[str]) -> dict[str, str]:
    """What --lora says: NAME=REF of each.

    >>> named(["luna=luna-tune@2"])
    {'luna': 'luna-tune@2'}
    """
    found: dict[str, str] = {}
    for one in adapters:
        name, _, ref = one.partition("=")
        if not name or not ref or name in found:
            raise ServeError(
                f"--lora {one}",
                rule="must be NAME=REF, each name once",
                next="for example --lora luna=./luna-adapter",
            )
        found[name] = ref
    return found


def served_name(ref: str) -> str:
    """What clients call the model by.

    >>> served_name("cria@2"), served_name("models/tiny.Q4_1.gguf"), served_name("hf:org/name")
    ('cria@2', 'tiny.Q4_1', 'org/name')
    """
    if ref.startswith("hf:"):
        return ref[3:]
    if "/" in ref or ref.endswith((".gguf", ".pth")) or ref in (".", ".."):
        return Path(ref).resolve().name.removesuffix(".gguf").removesuffix(".pth")
    return ref


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


def _engine(
    ref: str, book: Book | None, template: str | None, adapters: Mapping[str, Path]
) -> Engine:
    engine = load(ref, book=book, template=template).engine
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
    return engine


async def _run(
    workers: dict[str, Worker], listener: socket.socket, host: str, key: str | None
) -> None:
    api = app(workers, key=key)

    @contextlib.asynccontextmanager
    async def life(api: FastAPI) -> AsyncIterator[None]:
        for worker in workers.values():
            worker.start()
        yield
        for worker in workers.values():
            await asyncio.to_thread(worker.stop)

    api.router.lifespan_context = life
    config = uvicorn.Config(
        api, log_level="warning", access_log=False, timeout_graceful_shutdown=int(STOP_S)
    )
    server = uvicorn.Server(config)
    announcing = asyncio.create_task(_announce(workers, listener, host, key, server))
    try:
        await server.serve(sockets=[listener])
        failure = next((w.failure for w in workers.values() if w.failure), None)
        if failure is not None:
            raise failure
    finally:
        announcing.cancel()


async def _announce(
    workers: dict[str, Worker],
    listener: socket.socket,
    host: str,
    key: str | None,
    server: uvicorn.Server,
) -> None:
    """Say how to call the server once all models are there; stop it when one cannot be loaded."""
    console = Console(stderr=True, highlight=False)
    place = f"[{host}]" if ":" in host else host
    url = f"http://{place}:{listener.getsockname()[1]}"
    console.print(f"loading {', '.join(workers)} …", markup=False)
    while not all(worker.ready for worker in workers.values()):
        if any(worker.failure for worker in workers.values()):
            server.should_exit = True
            return
        await asyncio.sleep(0.05)
    console.print(how_to_call(url, next(iter(workers)), key is not None), markup=False)


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
