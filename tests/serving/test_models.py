"""Several models in one server: loaded when asked for, unloaded for others or when idle."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from herdbook.engine.engine import Engine
from herdbook.engine.memory import estimated_bytes, held_bytes
from herdbook.serving.api import app
from herdbook.serving.models import Models
from herdbook.serving.problems import Refusal
from herdbook.serving.setup import Setup
from herdbook.serving.visits import Visit
from herdbook.serving.worker import Worker

from .conftest import Client, tiny_engine


@pytest.fixture
def make(tiny_folder: Path) -> Iterator[Callable[..., Models]]:
    """make("a", "b", room=2): models of equal size, and a budget for so many of them."""
    made: list[Worker] = []
    bytes = estimated_bytes(tiny_folder)

    def models(*names: str, room: float, **settings: Any) -> Models:
        workers = {
            name: Worker(name, lambda: tiny_engine(tiny_folder), estimate_bytes=bytes)
            for name in names
        }
        made.extend(workers.values())
        return Models(workers, memory_bytes=int(bytes * room * 1.05), **settings)

    yield models
    for worker in made:
        worker.stop(grace_s=0)


def loaded(models: Models) -> set[str]:
    return {name for name, worker in models.items() if worker.ready}


def ask(client: Client, model: str) -> Any:
    return client.complete("hello", model=model, max_tokens=2)


def test_the_estimate_is_what_it_takes(tiny_folder: Path):
    held = held_bytes(tiny_engine(tiny_folder))
    assert estimated_bytes(tiny_folder) == pytest.approx(held, rel=0.02)


def test_the_one_idle_longest_makes_room(make: Callable[..., Models]):
    models = make("a", "b", "c", room=2)
    client = Client(app(models))
    assert loaded(models) == set() and client("GET", "/health").status_code == 200
    for model in ("a", "b", "a", "c"):
        assert ask(client, model).status_code == 200
    assert loaded(models) == {"a", "c"}
    assert models["b"]._engine is None
    assert ask(client, "b").status_code == 200
    assert loaded(models) == {"b", "c"}


def test_a_model_in_use_is_never_unloaded(make: Callable[..., Models]):
    models = make("a", "b", room=1, wait_s=0.3)

    async def go() -> None:
        first = Visit()
        worker = await models.take("a", first)
        waiting = Visit()
        with pytest.raises(Refusal, match="are in use of the") as refused, waiting.held:
            await models.take("b", waiting)
        assert refused.value.code == "no_room" and worker.ready
        first.held.close()
        models._wait_s = 30
        second = Visit()
        assert (await models.take("b", second)).ready and not worker.ready
        second.held.close()

    asyncio.run(go())


def test_one_that_can_never_fit_is_refused_with_the_numbers(make: Callable[..., Models]):
    with pytest.raises(Refusal, match=r"takes .* MB, cache included") as refused:
        make("a", room=0.5)
    assert "--memory" in refused.value.next


def test_one_that_turns_out_too_large_is_refused_and_gone(tiny_folder: Path):
    worker = Worker("a", lambda: tiny_engine(tiny_folder))  # nothing is known before
    models = Models({"a": worker}, memory_bytes=1000)
    client = Client(app(models))
    for _ in range(2):
        response = ask(client, "a")
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "model_too_large"
    worker.stop(0)
    assert worker.state == "unloaded"


def test_many_who_ask_for_a_model_that_loads_wait_for_one_loading(tiny_folder: Path):
    loads, go = [], threading.Event()

    def slowly() -> Engine:
        loads.append(1)
        go.wait(30)
        return tiny_engine(tiny_folder)

    models = Models({"a": Worker("a", slowly)}, memory_bytes=10**9, max_waiting=3)

    async def crowd() -> list[Any]:
        async def one() -> Any:
            visit = Visit()
            try:
                return await models.take("a", visit)
            finally:
                visit.held.close()

        asking = [asyncio.create_task(one()) for _ in range(5)]
        await asyncio.sleep(0.1)
        go.set()
        return await asyncio.gather(*asking, return_exceptions=True)

    found = asyncio.run(crowd())
    assert len(loads) == 1
    assert [isinstance(one, Worker) for one in found] == [True] * 3 + [False] * 2
    assert "wait for a to load" in str(found[-1])
    assert not models.held["a"] and not models.waiting["a"]
    models["a"].stop(0)


def test_idle_models_are_unloaded(make: Callable[..., Models]):
    models = make("a", "b", room=2, idle_s=0.2)
    client = Client(app(models))
    assert ask(client, "a").status_code == 200

    async def wait() -> None:
        async with models.sweeping():
            held = Visit()
            await models.take("b", held)
            end = time.monotonic() + 20
            while models["a"].state != "unloaded" and time.monotonic() < end:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.3)
            assert loaded(models) == {"b"}  # in use, however long
            held.held.close()

    asyncio.run(wait())


def test_a_failed_load_is_tried_again_by_the_next_who_asks(tiny_folder: Path):
    tries: list[int] = []

    def flaky() -> Engine:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("the disk was asleep")
        return tiny_engine(tiny_folder)

    models = Models({"a": Worker("a", flaky)}, idle_s=60)
    client = Client(app(models))
    first = ask(client, "a")
    assert first.status_code == 503 and "the disk was asleep" in first.json()["error"]["message"]
    assert ask(client, "a").status_code == 200
    models["a"].stop(0)


def test_replies_are_the_same_after_an_unloading(make: Callable[..., Models]):
    models = make("a", "b", room=1)
    client = Client(app(models))
    texts = {ask(client, name).json()["choices"][0]["text"] for name in ("a", "b", "a", "b")}
    assert len(texts) == 1


def test_adapters_come_back_with_their_model(tiny_folder: Path, adapter: Path):
    models = Setup([str(tiny_folder)], adapters={"luna": str(adapter)}, idle_s=60).models(None)
    client, base = Client(app(models)), models[tiny_folder.name]
    keys: dict[str, Any] = {"max_tokens": 6, "logprobs": 2, "echo": True}
    said = []
    for _ in range(2):
        names = ("luna", base.name)
        said.append(
            [client.complete("hello", model=one, **keys).json()["choices"] for one in names]
        )
        base.stop(grace_s=0)
        assert base.state == "unloaded"
    assert said[0] == said[1] and said[0][0] != said[0][1]


@pytest.mark.parametrize("cache", [None, "float32", "bfloat16", "int8"])
def test_the_cache_and_the_guesses_that_were_asked_for(tiny_folder: Path, cache: Any):
    models = Setup([str(tiny_folder)], idle_s=60, cache=cache, speculate=True).models(None)
    client, worker = Client(app(models)), models[tiny_folder.name]
    prompt = [5, 6, 7, 8] * 20
    reply = client.complete(prompt, model=worker.name, ignore_eos=True, max_tokens=60)
    assert reply.json()["usage"]["completion_tokens"] == 60
    assert cache is None or worker.engine.runner.kind == cache
    page = client("GET", "/metrics").text
    drafted = re.search(rf'drafted_tokens_total{{model="{worker.name}"}} (\d+)', page)
    assert drafted and int(drafted[1]) > 0
    worker.stop(grace_s=0)
