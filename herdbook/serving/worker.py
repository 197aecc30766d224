"""A worker: one thread that owns one engine, fed from any other thread.

    event loop / terminal                    worker's thread
      stream(requests) ── submit ──►  inbox ──►  engine.submit
                       ◄─ Piece ───────────────  engine.step   (all requests in one batch)
      leaves early     ── cancel ──►  inbox ──►  engine.abort  (pages are free at once)

An engine belongs to one thread; so every touch of it is a message, a closure put into `inbox`, and
no lock guards it. Several clients' requests meet in the engine's batch: none waits for another to
end.

Between two lives (`unload`, then `start` again) a worker holds no model and no memory.

>>> worker = Worker("luna", load=lambda: load("luna").engine)      # doctest: +SKIP
>>> worker.start()                                                 # doctest: +SKIP
>>> async for at, piece in worker.stream([Request(ids)]): ...      # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from herdbook.engine.engine import Engine
from herdbook.engine.memory import held_bytes
from herdbook.engine.request import Piece, Request
from herdbook.errors import CapacityError, HerdbookError, ServeError
from herdbook.serving.metrics import ModelNumbers

MAX_OPEN = 256  # requests in the engine or waiting for it; more are refused, not queued for ever
STOP_S = 30.0  # how long stop() lets running replies finish

log = logging.getLogger("herdbook.serving")

State = Literal["unloaded", "loading", "ready", "stopping", "failed"]
Put = Callable[[str, Piece | Exception], None]  # (request id, what became of it)


class Busy(CapacityError):
    """Too many requests are open: try again later."""


class Broken(HerdbookError):
    """The engine failed on a request: our fault, not the client's."""


class Worker:
    """Owns an engine. `name` is what clients call the model by; `adapters` are further names, under
    which it answers with an adapter that `load` has put beside it; `bytes` what it holds in memory
    (before the first load: an estimate, 0 where there is none)."""

    def __init__(
        self,
        name: str,
        load: Callable[[], Engine],
        *,
        adapters: Sequence[str] = (),
        max_open: int = MAX_OPEN,
        estimate_bytes: int = 0,
    ) -> None:
        self.name, self.adapters = name, tuple(adapters)
        self.created, self.bytes = int(time.time()), estimate_bytes
        self.numbers = ModelNumbers()
        self.state: State = "unloaded"
        self.failure: Exception | None = None  # why loading failed
        self._load, self._max_open = load, max_open
        self._engine: Engine | None = None
        self._stats: dict[str, Any] = {}  # as of the last time that somebody asked
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[str, Put] = {}  # touched by the worker's thread alone
        self._deadline: float | None = None  # set when stopping
        self._loaded = threading.Event()  # or failed to
        self._lock = threading.Lock()  # guards the next two
        self._open = 0  # requests that callers wait for
        self._ended = False  # nobody reads the inbox any more
        self._thread: threading.Thread | None = None

    # -- for other threads ------------------------------------------------------------------

    def start(self) -> None:
        """Load the model and begin to serve; returns at once. Also after stop() has ended."""
        assert self.state in ("unloaded", "failed"), self.state
        self.state, self.failure, self._deadline = "loading", None, None
        self._loaded.clear()
        self._ended = False
        # A daemon: loading cannot be interrupted, and Ctrl-C must not wait for it.
        self._thread = threading.Thread(target=self._run, name=f"worker {self.name}", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def open(self) -> int:
        """How many requests run or wait."""
        return self._open

    @property
    def engine(self) -> Engine:
        """For what never changes (tokenizer, limits). Its methods are the worker's alone."""
        assert self._engine is not None, "asked before ready"
        return self._engine

    def wait(self, timeout_s: float | None = None) -> Worker:
        """Until the model is loaded; raises what loading raised."""
        if not self._loaded.wait(timeout_s):
            raise TimeoutError(f"{self.name} did not load within {timeout_s} s")
        if self.failure is not None:
            raise self.failure
        return self

    def unload(self, grace_s: float = 0.0) -> None:
        """No new requests; running ones may finish within `grace_s`, the rest is aborted. Then the
        model's memory is free. Returns at once; `state` says when it is done."""
        if self.ready:
            self.state = "stopping"
            self._inbox.put(partial(self._begin_stop, time.monotonic() + grace_s))

    def stop(self, grace_s: float = STOP_S) -> None:
        """The same, and wait for it."""
        self.unload(grace_s)
        if self._thread is not None and self.state != "loading":
            self._thread.join(grace_s + 10)

    async def stats(self, patience_s: float = 1.0) -> dict[str, Any]:
        """`Engine.stats()`, or what it was when last asked if the engine is too busy to say."""
        done = threading.Event()

        def ask() -> None:
            self._stats = self.engine.stats()
            done.set()

        if self.ready:
            self._inbox.put(ask)
            import asyncio

            await asyncio.to_thread(done.wait, patience_s)
        return self._stats if self.ready else {}

    async def stream(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Piece], None]:
        """(which request, its next piece) as they come, until the last one has ended.

        Closing the iterator early, or cancelling the task that reads it, aborts what still runs.
        The first error ends all: they are the choices of one reply.
        """
        import asyncio  # which a terminal never needs

        loop = asyncio.get_running_loop()
        inbound: asyncio.Queue[tuple[str, Piece | Exception]] = asyncio.Queue()

        def put(id: str, item: Piece | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(inbound.put_nowait, (id, item))

        with self._take(requests, put) as job:
            while job.left:
                taken = job.took(*await inbound.get())
                if taken is not None:
                    yield taken

    def pieces(self, request: Request) -> Generator[Piece, None, None]:
        """The same for one request and a thread without an event loop (the terminal chat).

        The wait can be interrupted by Ctrl-C without harm to the engine, which runs elsewhere.
        """
        inbound: queue.SimpleQueue[tuple[str, Piece | Exception]] = queue.SimpleQueue()
        with self._take([request], lambda id, item: inbound.put((id, item))) as job:
            while job.left:
                taken = job.took(*inbound.get())
                if taken is not None:
                    yield taken[1]

    @contextlib.contextmanager
    def _take(self, requests: Sequence[Request], put: Put) -> Iterator[_Job]:
        """Count the requests as open, begin them, and clean up whatever happens."""
        with self._lock:
            if self._open + len(requests) > self._max_open:
                raise Busy(
                    f"{self._open} requests are open",
                    rule=f"and {self.name} takes at most {self._max_open}",
                    next="try again in a moment",
                )
            self._open += len(requests)
        job = _Job(requests, partial(self._post, put))
        try:
            job.begin()
            yield job
        finally:
            if job.left:
                self._inbox.put(partial(self._cancel, list(job.left)))
            with self._lock:
                self._open -= len(requests)

    def _post(self, put: Put, request: Request) -> None:
        with self._lock:
            if not self._ended:
                self._inbox.put(partial(self._submit, request, put))
                return
        put(request.id, stopping())

    # -- in the worker's thread -------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._engine = self._load()
            self.bytes = held_bytes(self._engine)
            self.state = "ready"
        except Exception as error:  # noqa: BLE001  kept: wait(), /health and every request tell it
            self.failure, self.state = error, "failed"
            return
        finally:
            self._loaded.set()
        while not self._over:
            self._read_inbox()
            if self._running and not self._over:
                self._step()
        self._end_all(stopping())
        with self._lock:
            self._ended = True
        self._read_inbox()  # what came in the meantime is refused, not forgotten
        self._engine, self._stats = None, {}
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory otherwise
            libc.malloc_trim(0)
        self.state = "unloaded"

    @property
    def _over(self) -> bool:
        if self._deadline is None:
            return False
        return not self._running or time.monotonic() > self._deadline

    def _read_inbox(self) -> None:
        """Do what others asked; sleep until they do when there is nothing else to do."""
        idle = not self._running and self._deadline is None
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get(block=idle)()
                idle = False

    def _submit(self, request: Request, put: Put) -> None:
        try:
            if self._deadline is not None:
                raise stopping()
            self.engine.submit(request)
        except HerdbookError as error:
            put(request.id, error)
        except Exception as error:
            log.exception("the engine failed to take a request")
            put(request.id, _broken(error))
        else:
            self._running[request.id] = put

    def _cancel(self, ids: Sequence[str]) -> None:
        for id in ids:
            if self._running.pop(id, None):
                self.engine.abort(id)

    def _step(self) -> None:
        try:
            pieces = self.engine.step()
        except Exception as error:
            # Whose fault it was cannot be told: all in the batch fail, the next ones start clean.
            log.exception("the engine failed; %d requests end", len(self._running))
            self._end_all(_broken(error))
            self.engine.forget()
            return
        for piece in pieces:
            if piece.reply is not None:
                self.numbers.ended(piece.reply)
            put = self._running.get(piece.request_id)
            if put is None:  # the last words of one that was cancelled
                continue
            if piece.finish is not None:
                del self._running[piece.request_id]
            failed = piece.reply.error if piece.reply else None
            if failed is not None and not isinstance(failed, HerdbookError):
                log.error("a request failed", exc_info=failed)
                failed = _broken(failed)
            put(piece.request_id, failed or piece)

    def _end_all(self, error: Exception) -> None:
        for id, put in self._running.items():
            self.engine.abort(id)
            put(id, error)
        self._running.clear()

    def _begin_stop(self, deadline: float) -> None:
        self._deadline = deadline


class _Job:
    """The requests that one caller waits for, in order.

    Requests with the same prompt (n > 1) start one after the other's first piece: by then the
    prompt's pages are in the engine's cache, and it is computed once, not n times.
    """

    def __init__(self, requests: Sequence[Request], submit: Callable[[Request], None]) -> None:
        self.left = {request.id: at for at, request in enumerate(requests)}
        self._submit = submit
        self._groups: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            self._groups.setdefault(tuple(request.ids), []).append(request)
        self._twins = {group[0].id: group[1:] for group in self._groups.values()}

    def begin(self) -> None:
        for group in self._groups.values():
            self._submit(group[0])

    def took(self, id: str, item: Piece | Exception) -> tuple[int, Piece] | None:
        """What the worker sent about request `id`."""
        at = self.left[id]
        if isinstance(item, Exception):
            del self.left[id]
            raise item
        for twin in self._twins.pop(id, []):
            self._submit(twin)
        if item.finish is not None:
            del self.left[id]
        return at, item


def _broken(error: Exception) -> Broken:
    return Broken(
        f"the engine failed: {type(error).__name__}: {error}",
        next="the server goes on; its log has the details",
    )


def stopping() -> ServeError:
    return ServeError("the server", rule="is stopping", next="ask again when it is back")
