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
from herdbook.engine.loading import load
from herdbook.engine.request import Request, Sampling
from herdbook.serving.api import app
from herdbook.serving.worker import Worker
from herdbook.tokens.chat import render


def tiny_engine(folder: Path) -> Engine:
    return load(str(folder)).engine


@pytest.fixture(scope="session")
def worker(tiny_folder: Path) -> Iterator[Worker]:
    one = Worker("tiny", lambda: tiny_engine(tiny_folder))
    one.start()
    yield one.wait(60)
    one.stop(grace_s=0)


@pytest.fixture(scope="session")
def stopping(
    tiny_folder: Path, worker: Worker, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """A template whose turns end with a text, the model's whole reply to 你好, and what is left of it."""
    tokenizer = worker.engine.tokenizer
    assert tokenizer is not None
    ids = render(tokenizer, [{"role": "user", "content": "你好"}], reply=True).ids
    whole = "".join(one.text for one in worker.pieces(Request(ids, Sampling(max_tokens=24))))
    at = next(at for at in range(1, len(whole) - 1) if whole.index(whole[at : at + 2]) == at)
    stop = whole[at : at + 2]
    file = tmp_path_factory.mktemp("template") / "stopping.jinja"
    said = "{%- set stop_strings = [" + repr(stop) + "] -%}" + str(tokenizer.chat_template)
    file.write_text(said, encoding="utf-8")
    return file, whole, whole[:at]


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
