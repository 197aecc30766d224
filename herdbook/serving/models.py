"""The models of one server: loaded when they are asked for, within a budget of memory.

Without a budget all are loaded at the start and stay. With `memory_bytes` or `idle_s` a model is
loaded by the first request that names it, and

* to make room, the model that has been idle longest is unloaded; one in use never is;
* a model that can never fit is refused, with the numbers;
* whoever asks for a model that loads, or that finds no room yet, waits: at most `max_waiting` do for
  one model, and for at most `wait_s` seconds;
* a model that nobody has asked for in `idle_s` seconds is unloaded.

All methods belong to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping

from herdbook.book.tree import human_bytes
from herdbook.serving.problems import Refusal
from herdbook.serving.visits import Visit
from herdbook.serving.worker import Busy, Worker, stopping

LOAD_WAIT_S = 300.0
MAX_WAITING = 64
LOOK_S = 0.02  # how often somebody who waits looks again


class Models(Mapping[str, Worker]):
    """Workers by the name that clients call them by."""

    def __init__(
        self,
        workers: Mapping[str, Worker],
        *,
        memory_bytes: int | None = None,
        idle_s: float | None = None,
        wait_s: float = LOAD_WAIT_S,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._workers = dict(workers)
        self.memory_bytes, self._idle_s = memory_bytes, idle_s
        self._wait_s, self._max_waiting = wait_s, max_waiting
        self.on_demand = memory_bytes is not None or idle_s is not None
        self.held = Counter[str]()  # visits that use a model or wait for it
        self.waiting = Counter[str]()  # those of them that wait
        self._stopping = False
        self._used_at = dict.fromkeys(workers, 0.0)
        for worker in workers.values():
            self._check_size(worker)

    def __getitem__(self, name: str) -> Worker:
        return self._workers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def named(self) -> dict[str, Worker]:
        """By every name that a client may give: those of adapters stand for the model below them."""
        return self._workers | {name: one for one in self.values() for name in one.adapters}

    def find(self, name: str) -> Worker:
        """A model by its name or an adapter's, loaded or not."""
        named = self.named
        if name not in named:
            raise Refusal(
                404,
                f"the model {name!r}",
                rule="is not served here",
                next="served are: " + ", ".join(map(repr, named)),
                code="model_not_found",
                param="model",
            )
        return named[name]

    async def take(self, name: str, visit: Visit) -> Worker:
        """A model that is ready, and stays so until the visit ends."""
        worker = self.find(name)
        visit.model = name
        self.held[worker.name] += 1
        visit.held.callback(self._let_go, worker.name)
        if self.on_demand and worker.state == "failed":
            worker.state = "unloaded"  # its last chance was another visit's
        if not worker.ready:
            await self._wait(worker)
        return worker

    @property
    def healthy(self) -> bool:
        """Whether a request for any model would be answered."""
        return self.on_demand or all(worker.ready for worker in self.values())

    def start(self) -> None:
        """Load what is to be loaded at the start."""
        if not self.on_demand:
            for worker in self.values():
                worker.start()

    async def stop(self, grace_s: float) -> None:
        """No new requests; running ones may finish within `grace_s`."""
        self._stopping = True
        await asyncio.gather(*(asyncio.to_thread(one.stop, grace_s) for one in self.values()))

    @contextlib.asynccontextmanager
    async def sweeping(self, every_s: float = 1.0) -> AsyncIterator[None]:
        """Meanwhile idle models are unloaded."""

        async def sweep() -> None:
            while self._idle_s is not None:
                self.sweep()
                await asyncio.sleep(min(every_s, self._idle_s))

        sweeper = asyncio.create_task(sweep())
        try:
            yield
        finally:
            sweeper.cancel()

    def sweep(self) -> None:
        """Unload what has been idle for too long."""
        assert self._idle_s is not None
        for worker in self._idle():
            if time.monotonic() - self._used_at[worker.name] >= self._idle_s:
                worker.unload()

    def _let_go(self, name: str) -> None:
        self.held[name] -= 1
        self._used_at[name] = time.monotonic()

    async def _wait(self, worker: Worker) -> None:
        """Until it is ready; start it where that is ours to do."""
        name = worker.name
        if self.waiting[name] >= self._max_waiting:
            raise Busy(
                f"{self.waiting[name]} requests wait for {name} to load",
                rule="and more are not queued",
                next="try again in a moment",
            )
        self.waiting[name] += 1
        end = time.monotonic() + self._wait_s
        try:
            while not worker.ready:
                if self._stopping:
                    raise stopping()
                self._check_size(worker)
                if worker.state == "failed":
                    raise Refusal(
                        503, f"{name} failed to load: {worker.failure}", code="model_failed"
                    )
                if worker.state == "unloaded" and self.on_demand and self._room(worker):
                    worker.start()
                if time.monotonic() > end:
                    raise self._too_late(worker)
                await asyncio.sleep(LOOK_S)
        finally:
            self.waiting[name] -= 1
        self._check_size(worker)  # now it is measured
        idle = self._idle()
        while self.memory_bytes is not None and idle and self._needed() > self.memory_bytes:
            idle.pop(0).unload()

    def _room(self, worker: Worker) -> bool:
        """Whether it fits now; if not, the model that was idle longest is being unloaded."""
        if self.memory_bytes is None or self._taken() + worker.bytes <= self.memory_bytes:
            return True
        idle = self._idle()
        if idle and not any(one.state == "stopping" for one in self.values()):
            idle[0].unload()
        return False

    def _taken(self) -> int:
        """Bytes of what is loaded, is being loaded or not yet gone."""
        stopping = sum(one.bytes for one in self.values() if one.state == "stopping")
        return self._needed() + stopping

    def _needed(self) -> int:
        """The same without what is about to go."""
        return sum(one.bytes for one in self.values() if one.state in ("loading", "ready"))

    def _idle(self) -> list[Worker]:
        """Loaded models that nobody uses, longest idle first."""
        idle = [one for one in self.values() if one.ready and not self.held[one.name]]
        return sorted(idle, key=lambda one: self._used_at[one.name])

    def _check_size(self, worker: Worker) -> None:
        """Refuse what does not fit even alone."""
        if self.memory_bytes is not None and worker.bytes > self.memory_bytes:
            worker.unload()
            raise Refusal(
                400,
                f"the model {worker.name!r} takes {human_bytes(worker.bytes)}, cache included,",
                rule=f"and the server may use {human_bytes(self.memory_bytes)}",
                next="give herd serve more --memory, or ask for another model",
                code="model_too_large",
                param="model",
            )

    def _too_late(self, worker: Worker) -> Refusal:
        if worker.state == "loading":
            return Refusal(
                503,
                worker.name,
                rule="is still loading",
                next="try again soon",
                code="model_loading",
            )
        taken = human_bytes(self._taken())
        return Refusal(
            503,
            f"{worker.name} takes {human_bytes(worker.bytes)}, and {taken} are in use",
            rule=f"of the {human_bytes(self.memory_bytes or 0)} that the server may use",
            next="try again when other models are idle",
            code="no_room",
        )
