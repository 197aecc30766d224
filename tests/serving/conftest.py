"""A real engine over the tiny random model, in a worker, behind the API, without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from herdbook.engine.engine import Engine
from herdbook.engine.loaded import load
from herdbook.serving.api import app
from herdbook.serving.worker import Worker


def tiny_engine(folder: Path) -> Engine:
    return load(str(folder)).engine


@pytest.fixture(scope="session")
def worker(tiny_folder: Path) -> Iterator[Worker]:
    one = Worker("tiny", lambda: tiny_engine(tiny_folder))
    one.start()
    yield one.wait(60)
    one.stop(grace_s=0)


@dataclass
class Client:
    """Calls the application in-process. Without a key it is on this machine's own name."""

    api: FastAPI

    def __call__(self, method: str, path: str, **keys: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                return await http.request(method, path, **keys)

        return asyncio.run(go())

    def chat(self, text: str = "hello", **keys: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 12} | keys
        return self("POST", "/v1/chat/completions", json=body)

    def complete(self, prompt: Any = "hello", **keys: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 12} | keys
        return self("POST", "/v1/completions", json=body)


@pytest.fixture
def client(worker: Worker) -> Client:
    return Client(app({"tiny": worker}))


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a finished stream; asserts that it ends in [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""], response.text
    return [json.loads(line) for line in lines[:-2]]
