"""`herd serve MODEL --cluster --workers N`: the workers of `cluster` on the machines of a Ray cluster.

    clients ── controller ──┬── worker 0    an ordinary server on another machine, held by a Ray actor
                            └── …

Ray places the workers, starts them and tells of their end and of their machine's; requests and replies
go from the controller straight to them by HTTP. The controller is what it is for processes: the keys,
the limits, the retries and the choice by prompt are its own, so Ray Serve's proxy and router, which
have none of these, are not used.

A worker listens on the address by which Ray knows its machine, not on loopback, and answers only who
sends the secret, which travels to it through Ray. Like Ray's own traffic by default it is not encrypted:
both belong on a network of their own. Who reaches Ray itself can run any code there, unless it asks for
a token (RAY_AUTH_MODE=token). Hence no Ray is started here, whose ports would be open to everyone.

Every machine needs this Herdbook, and opens the references itself: a path that all of them see, `hf:`
or a name in the book at its own HERDBOOK_HOME.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from herdbook.errors import ServeError

if TYPE_CHECKING:
    from herdbook.serving.cluster import Spawn

PLACE_S = 30.0  # so long may Ray look for a place in silence

log = logging.getLogger("herdbook.serving")


class Replica:
    """The actor: holds a worker process on its machine, which ends with it."""

    def __init__(self, told: dict[str, Any]) -> None:
        import ray

        self.host = ray.util.get_node_ip_address()
        command = [sys.executable, "-m", "herdbook.serving.member"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self.process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it died at once; its end tells
            self.process.stdin.write(json.dumps({**told, "host": self.host}).encode() + b"\n")
            self.process.stdin.flush()

    def url(self) -> str | None:
        assert self.process.stdout is not None
        port = self.process.stdout.readline()
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{int(port)}" if port else None

    def wait(self) -> int:
        return self.process.wait()

    def terminate(self) -> None:
        self.process.terminate()


class RemoteProcess:
    """A worker somewhere, by the handle of its actor."""

    def __init__(self, actor: Any) -> None:
        self._actor, self._placed = actor, False

    async def url(self) -> str | None:
        from ray.exceptions import RayError

        placed = asyncio.ensure_future(self._actor.__ray_ready__.remote())
        try:
            while not (await asyncio.wait([placed], timeout=PLACE_S))[0]:
                log.warning("Ray has no place for a worker yet; see: ray status")
            placed.result()
            self._placed = True
            found: str | None = await self._actor.url.remote()
        except RayError:
            self.kill()  # where it has not ended, nobody could reach it
            return None
        finally:
            placed.cancel()
        return found

    async def wait(self) -> object:
        from ray.exceptions import RayError

        try:
            return await self._actor.wait.remote()
        except RayError as error:
            return str(error).strip().rpartition("\n")[2]
        finally:
            self.kill()  # the actor: its place is free for the next

    def terminate(self) -> None:
        if self._placed:
            self._actor.terminate.remote()
        else:
            self.kill()

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


@contextlib.contextmanager
def connected(replicas: int) -> Iterator[Spawn]:
    """Meanwhile Ray starts workers, on as many machines as there are.

    Errors: ServeError where Ray is missing, cannot be reached or has fewer cores than replicas.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ServeError(
            "--cluster", rule="needs Ray", next="pip install 'herdbook[cluster]'"
        ) from error
    address = os.environ.get("RAY_ADDRESS") or "auto"
    try:
        if address != "auto":  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ServeError(
            f"RAY_ADDRESS {address}",
            rule=f"cannot be joined: {str(error).partition(chr(10))[0]}",
            next="start it: ray start --head, and on the others ray start --address=HOST:6379; then "
            "set RAY_ADDRESS=HOST:6379 on a machine of the cluster",
        ) from error
    try:
        machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        kind = ray.remote(Replica).options(
            num_cpus=cores_each([int(cores) for cores in machines], replicas),
            max_concurrency=3,  # url, wait and terminate
            scheduling_strategy="SPREAD",
        )

        async def spawn(told: dict[str, Any]) -> RemoteProcess:
            return RemoteProcess(kind.remote(told))

        yield spawn
    finally:
        ray.shutdown()


def cores_each(machines: Sequence[int], replicas: int) -> int:
    """The most cores that each of the replicas can have on machines with so many.

    >>> cores_each([8, 8], 2), cores_each([8, 8], 3), cores_each([64, 1], 1)
    (8, 4, 64)
    """
    for cores in range(max(machines, default=0), 0, -1):
        if sum(machine // cores for machine in machines) >= replicas:
            return cores
    raise ServeError(
        f"--workers {replicas}",
        rule=f"are more than the cores of Ray's cluster: {sum(machines)}",
        next="fewer, or let another machine join: ray start --address=HOST:6379",
    )
