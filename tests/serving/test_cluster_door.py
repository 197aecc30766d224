"""The door of a cluster over workers of our making: full ones, one that hangs, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from herdbook.serving.api import app
from herdbook.serving.cluster import Cluster, LocalProcess, local
from herdbook.serving.cluster import app as door_of
from herdbook.serving.keyring import KeyRing
from herdbook.serving.problems import shaped
from herdbook.serving.server import listen
from herdbook.serving.setup import Setup
from herdbook.serving.worker import Worker


class Served(uvicorn.Server):
    """An application on a port of its own, as the process of a worker."""

    def __init__(self, api: FastAPI) -> None:
        super().__init__(uvicorn.Config(api, log_level="warning", access_log=False))
        self.listener = listen("127.0.0.1", 0)
        self.ending = asyncio.create_task(self.serve(sockets=[self.listener]))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are the tests'

    async def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    async def wait(self) -> object:
        await self.ending
        self.listener.close()
        return 0

    def terminate(self) -> None:
        self.should_exit = True

    kill = terminate


@contextlib.asynccontextmanager
async def door(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the cluster, once all workers are ready."""
    served = Served(door_of(cluster, KeyRing("s3cret")))
    async with cluster.running():
        await until(lambda: all(member.ready for member in cluster.members))
        key = {"Authorization": "Bearer s3cret"}
        async with httpx.AsyncClient(
            base_url=await served.url(), headers=key, timeout=60, trust_env=False
        ) as client:
            yield client
        served.terminate()
        await served.wait()


async def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def full(answers: Sequence[tuple[int, str, str]]) -> tuple[Cluster, list[int]]:
    """Workers that answer each request with (status, Retry-After, code); who was asked, in order."""
    asked: list[int] = []
    numbers = iter(range(len(answers)))

    async def spawn(told: dict[str, Any]) -> Served:
        number, api = next(numbers), FastAPI()
        status, wait, code = answers[number]

        @api.get("/health")
        async def health() -> None: ...

        @api.post("/v1/completions")
        async def complete() -> JSONResponse:
            asked.append(number)
            body = {"by": number} if status == 200 else shaped(status, "no", code=code)
            return JSONResponse(body, status, {"Retry-After": wait})

        return Served(api)

    return Cluster(len(answers), ["tiny"], {}, spawn), asked


def answered(cluster: Cluster, asked: list[int]) -> tuple[httpx.Response, list[int]]:
    async def go() -> httpx.Response:
        async with door(cluster) as client:
            return await client.post("/v1/completions", json={"prompt": "Hi"})

    return asyncio.run(go()), asked


def test_another_worker_answers_when_one_is_full():
    answer, asked = answered(
        *full([(503, "2", "overloaded"), (503, "2", "overloaded"), (200, "0", "")])
    )
    assert (answer.status_code, answer.json()) == (200, {"by": 2})
    assert asked == [0, 1, 2]


def test_the_client_hears_of_it_when_all_are_full():
    answer, asked = answered(
        *full([(503, "9", "overloaded"), (503, "3", "server_stopping"), (503, "7", "overloaded")])
    )
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
    assert sorted(asked) == [0, 1, 2]


def test_who_has_waited_for_a_model_does_not_wait_again():
    answer, asked = answered(*full([(503, "2", "model_loading"), (200, "0", "")]))
    assert answer.status_code == 503 and asked == [0]


def test_who_leaves_pays_for_what_was_computed(worker: Worker):
    async def spawn(told: dict[str, Any]) -> Served:
        return Served(app({"tiny": worker}, key=told["secret"]))

    async def tokens(client: httpx.AsyncClient, outcomes: int) -> int:
        page = ""
        for _ in range(100):
            page = (await client.get("/metrics")).text
            if f'key_requests_total{{key="server",outcome="gone"}} {outcomes}' in page:
                break
            await asyncio.sleep(0.05)
        (row,) = [row for row in page.splitlines() if "key_tokens_total{" in row]
        return int(row.rpartition(" ")[2])

    async def go() -> None:
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "n": 8}
        async with door(Cluster(1, ["tiny"], {}, spawn)) as client:
            async with client.stream(
                "POST", "/v1/completions", json=body | {"stream": True}
            ) as some:
                seen = 0
                async for line in some.aiter_lines():
                    seen += line.startswith("data: ")
                    if seen == 10:
                        break
            paid = await tokens(client, 1)
            assert 3 + 8 <= paid < 3 + 8 * 400

            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json=body, timeout=0.2)
            more = await tokens(client, 2) - paid
            assert 3 < more < 3 + 8 * 400
            assert (await client.get("/usage/nobody")).status_code == 404

    asyncio.run(go())


def test_a_worker_that_hangs_is_replaced_and_its_requests_go_on(tiny_folder: Path):
    started: list[int] = []
    start = local(2)

    async def spawn(told: dict[str, Any]) -> LocalProcess:
        process = await start(told)
        started.append(process._process.pid)
        return process

    async def go() -> None:
        told = asdict(Setup([str(tiny_folder)]))
        cluster = Cluster(2, [tiny_folder.name], told, spawn, deaf_s=5.0)
        body = {"model": tiny_folder.name, "prompt": [5, 6, 7], "max_tokens": 4}
        async with door(cluster) as client:
            os.kill(started[0], signal.SIGSTOP)
            asking = [client.post("/v1/completions", json=body) for _ in range(8)]
            answers = await asyncio.gather(*asking)
            assert [one.status_code for one in answers] == [200] * 8
            await until(lambda: len(started) == 3 and all(one.ready for one in cluster.members))
            assert not Path(f"/proc/{started[0]}").exists()
            assert not any(one.open for one in cluster.members)

    asyncio.run(go())


def test_head_asks_for_no_body(worker: Worker):
    async def spawn(told: dict[str, Any]) -> Served:
        return Served(app({"tiny": worker}, key=told["secret"]))

    async def go() -> None:
        async with door(Cluster(1, ["tiny"], {}, spawn)) as client:
            for path in ("/health", "/metrics", "/v1/models", "/"):
                answer = await client.head(path)
                assert (answer.status_code, answer.content) == (200, b""), path
                assert int(answer.headers["content-length"]) > 0
            assert (await client.head("/v1/completions")).status_code == 405

    asyncio.run(go())
