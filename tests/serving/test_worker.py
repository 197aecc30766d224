"""The worker: many clients, clients that leave, engines that fail, loading, stopping."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from herdbook.engine.engine import Engine
from herdbook.engine.loading import load
from herdbook.engine.request import Request, Sampling
from herdbook.errors import FileError, RequestError, ServeError
from herdbook.serving.api import app
from herdbook.serving.models import Models
from herdbook.serving.worker import Broken, Busy, Worker

from .conftest import Client, tiny_engine

LONG = Sampling(max_tokens=400, ignore_eos=True)
SHORT = Sampling(max_tokens=8, ignore_eos=True)


async def read(worker: Worker, *requests: Request) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in requests]
    async for at, piece in worker.stream(requests):
        ids[at] += piece.ids
    return ids


def quiet(worker: Worker) -> None:
    """Nothing runs and no page is held."""
    for _ in range(500):
        stats = worker.engine.stats()
        if not (worker.open or stats["running"] or stats["waiting"] or stats["pages_used"]):
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"still busy: {worker.open=} {stats}")


@pytest.fixture
def own(tiny_folder: Path):
    """A worker that a test may break or stop."""
    one = Worker("own", lambda: tiny_engine(tiny_folder), max_open=4)
    one.start()
    yield one.wait(60)
    one.stop(grace_s=0)


def test_many_clients_get_what_each_gets_alone(worker: Worker):
    prompts = [[10 + at, 20, 30 + at] for at in range(6)]

    async def together() -> list[list[list[int]]]:
        return await asyncio.gather(*(read(worker, Request(ids, SHORT)) for ids in prompts))

    alone = [asyncio.run(read(worker, Request(ids, SHORT))) for ids in prompts]
    assert asyncio.run(together()) == alone
    quiet(worker)


def test_pieces_equals_stream(worker: Worker):
    ids = [11, 12, 13]
    sync = [id for piece in worker.pieces(Request(ids, SHORT)) for id in piece.ids]
    assert [sync] == asyncio.run(read(worker, Request(ids, SHORT)))


def test_leaving_early_frees_the_pages(worker: Worker):
    async def leave() -> None:
        stream = worker.stream([Request([5, 6, 7], LONG), Request([8, 9], LONG)])
        async for _ in stream:
            assert worker.open == 2
            break
        await stream.aclose()

    asyncio.run(leave())
    quiet(worker)


def test_a_cancelled_reader_frees_the_pages(worker: Worker):
    async def cancel() -> None:
        task = asyncio.create_task(read(worker, Request([5, 6, 7], LONG)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    quiet(worker)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_pages(worker: Worker, stream: bool):
    """Spoken in ASGI itself: the client sends a request, waits for the first bytes, and goes."""
    body = b'{"model":"tiny","messages":[{"role":"user","content":"hello"}],"n":2,"stream":%s}'
    body %= b"true" if stream else b"false"
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 123),
    }
    sent: list[dict[str, Any]] = []

    async def go() -> None:
        begun = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            if stream:
                await begun.wait()
            else:
                while not worker.open:
                    await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                begun.set()

        await app({"tiny": worker})(scope, receive, send)

    asyncio.run(asyncio.wait_for(go(), 20))
    quiet(worker)
    text = b"".join(message.get("body", b"") for message in sent)
    assert b"[DONE]" not in text
    assert stream == (b"data: " in text)


def test_a_wrong_request_fails_alone(worker: Worker):
    async def both() -> list[Any]:
        good, bad = read(worker, Request([5, 6], SHORT)), read(worker, Request([10**6], SHORT))
        return await asyncio.gather(good, bad, return_exceptions=True)

    good, bad = asyncio.run(both())
    assert len(good[0]) == 8
    assert isinstance(bad, RequestError) and "1000000" in str(bad)


def test_an_engine_error_ends_its_requests_and_the_worker_lives_on(
    own: Worker, monkeypatch: pytest.MonkeyPatch
):
    run = own.engine.runner.run
    expected = asyncio.run(read(own, Request([5, 6, 7], SHORT)))

    def fail(batch: Any) -> Any:  # once
        run(batch)
        monkeypatch.setattr(own.engine.runner, "run", run)
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(own.engine.runner, "run", fail)
    with pytest.raises(Broken, match="RuntimeError: the machine is on fire"):
        asyncio.run(read(own, Request([5, 6, 7], SHORT)))
    quiet(own)
    # forget() emptied the cache: no page of the broken step is left in it
    assert asyncio.run(read(own, Request([5, 6, 7], SHORT))) == expected

    monkeypatch.setattr(own.engine.runner, "run", fail)
    response = Client(app({"tiny": own})).chat()
    assert response.status_code == 500 and response.json()["error"]["code"] == "engine_failed"
    assert Client(app({"tiny": own})).chat().status_code == 200


def test_too_many_open_requests_are_refused(own: Worker):
    async def crowd() -> list[Any]:
        readers = [read(own, Request([5 + at, 6], SHORT)) for at in range(5)]
        return await asyncio.gather(*readers, return_exceptions=True)

    found = asyncio.run(crowd())
    assert sum(isinstance(one, Busy) for one in found) == 1
    assert "takes at most 4" in str(next(one for one in found if isinstance(one, Busy)))
    response = Client(app({"tiny": own})).chat(n=5)
    assert response.status_code == 503 and response.headers["retry-after"]
    assert response.json()["error"]["code"] == "overloaded"
    quiet(own)


def test_loading(tiny_folder: Path):
    go = threading.Event()

    def slowly() -> Engine:
        go.wait(30)
        return tiny_engine(tiny_folder)

    slow = Worker("tiny", slowly)
    slow.start()
    client = Client(app(Models({"tiny": slow}, wait_s=0.1)))
    response = client("GET", "/health")
    assert response.status_code == 503
    assert response.json()["models"]["tiny"]["status"] == "loading"
    response = client.chat()
    assert response.status_code == 503 and response.json()["error"]["code"] == "model_loading"
    go.set()
    slow.wait(60)
    assert client("GET", "/health").status_code == 200
    slow.stop(grace_s=0)


def test_a_model_that_fails_to_load(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    broken = Worker("tiny", lambda: load(str(tmp_path)).engine)
    broken.start()
    with pytest.raises(FileError):
        broken.wait(60)
    client = Client(app({"tiny": broken}))
    assert client("GET", "/health").json()["models"]["tiny"]["status"] == "failed"
    assert client.chat().json()["error"]["code"] == "model_failed"


def test_stop_lets_replies_finish(own: Worker):
    async def go() -> list[list[int]]:
        task = asyncio.create_task(read(own, Request([5, 6, 7], SHORT)))
        await asyncio.sleep(0)  # the request is in the inbox
        await asyncio.to_thread(own.stop, 30)
        return await task

    assert len(asyncio.run(go())[0]) == 8


def test_stop_aborts_what_takes_too_long(own: Worker):
    async def go() -> None:
        task = asyncio.create_task(read(own, Request([5, 6, 7], LONG)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(own.stop, 0)
        with pytest.raises(ServeError, match="is stopping"):
            await task
        with pytest.raises(ServeError, match="is stopping"):
            await read(own, Request([5, 6, 7], SHORT))

    asyncio.run(asyncio.wait_for(go(), 30))
