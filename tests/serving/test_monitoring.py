"""What the server says about itself: Prometheus' text, and one line a request without its contents."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.responses import Response

from herdbook.serving.api import app
from herdbook.serving.metrics import Histogram, Page
from herdbook.serving.monitoring import merged
from herdbook.serving.streaming import EventStream, data
from herdbook.serving.visits import Counts, Visits
from herdbook.serving.worker import Worker

from .conftest import Client, tiny_engine

SAMPLE = re.compile(r'[a-z_]+(\{([a-z_]+="([^"\\\n]|\\.)*",?)*\})? [0-9.e+-]+')


def numbers(client: Client) -> dict[str, float]:
    response = client("GET", "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for line in response.text.splitlines():
        if not line.startswith("# "):
            assert SAMPLE.fullmatch(line), line
            name, _, value = line.rpartition(" ")
            assert name not in found
            found[name] = float(value)
    return found


@pytest.fixture
def own(tiny_folder: Path):
    one = Worker("own", lambda: tiny_engine(tiny_folder))
    one.start()
    yield one.wait(60)
    one.stop(grace_s=0)


def test_metrics_count_what_was_served(own: Worker):
    client = Client(app({"own": own}))
    prompt = list(range(10, 50))
    usages = [
        client.complete(prompt, model="own", max_tokens=5, ignore_eos=True).json()["usage"]
        for _ in range(2)
    ]
    client.complete("x", model="nope")
    client.chat(model="own", n=0)
    found = numbers(client)
    label = 'model="own"'
    assert found[f'herdbook_requests_total{{{label},outcome="ok"}}'] == 2
    assert found['herdbook_requests_total{model="",outcome="refused"}'] == 2
    assert found[f"herdbook_prompt_tokens_total{{{label}}}"] == 80
    assert found[f"herdbook_completion_tokens_total{{{label}}}"] == 10
    cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached and found[f"herdbook_cached_tokens_total{{{label}}}"] == cached
    assert found[f"herdbook_prefix_hit_ratio{{{label}}}"] == cached / 80
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds"):
        assert found[f"herdbook_{name}_count{{{label}}}"] == 2
        assert found[f"herdbook_{name}_sum{{{label}}}"] > 0
        assert found[f'herdbook_{name}_bucket{{{label},le="+Inf"}}'] == 2
    assert found["herdbook_request_seconds_count"] == 4
    assert found[f"herdbook_model_loaded{{{label}}}"] == 1
    assert found[f"herdbook_pages_used{{{label}}}"] == 0
    assert found[f"herdbook_pages_cached{{{label}}}"] > 0
    assert found[f"herdbook_pages{{{label}}}"] == own.engine.stats()["pages"]
    assert found[f"herdbook_drafted_tokens_total{{{label}}}"] == 0
    assert not any("key" in name for name in found)


def test_keys_are_counted_apart_and_a_controller_counts_its_own(worker: Worker):
    client = Client(app({"tiny": worker}, key="s3cret"))
    headers = {"Authorization": "Bearer s3cret"}
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}
    client("POST", "/v1/completions", json=body, headers=headers)
    client("POST", "/v1/completions", json=body | {"n": 0}, headers=headers)
    client("POST", "/v1/embeddings", json={"model": "tiny", "input": [5, 6, 7]}, headers=headers)
    client("POST", "/v1/completions", json=body)
    page = client("GET", "/metrics", headers=headers).text
    assert 'herdbook_key_requests_total{key="server",outcome="ok"} 2' in page
    assert 'herdbook_key_requests_total{key="server",outcome="refused"} 1' in page
    assert 'herdbook_key_tokens_total{key="server"} 8' in page
    both = merged({"0": page}, Counts())
    assert "key=" not in both and "requests_total" not in both
    assert 'herdbook_pages{worker="0",model="tiny"}' in both


def test_metrics_while_the_engine_is_in_a_long_step(own: Worker):
    own._inbox.put(lambda: __import__("time").sleep(1.5))
    before = asyncio.run(own.stats(patience_s=0.1))
    assert before == {}  # never asked before
    assert asyncio.run(own.stats(patience_s=10))["pages_used"] == 0


def test_histograms_are_cumulative_and_bounds_are_included():
    one = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 3):
        one.observe(value)
    page = Page()
    page.metric("histogram", "x", "Something.", [({"model": 'a"\n\\'}, one)])
    label = r'model="a\"\n\\"'
    assert str(page) == (
        "# HELP herdbook_x Something.\n# TYPE herdbook_x histogram\n"
        f'herdbook_x_bucket{{{label},le="1"}} 2\nherdbook_x_bucket{{{label},le="2"}} 3\n'
        f'herdbook_x_bucket{{{label},le="+Inf"}} 4\nherdbook_x_sum{{{label}}} 6\n'
        f"herdbook_x_count{{{label}}} 4\n"
    )


def test_one_line_a_request_and_no_contents(worker: Worker, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "herdbook.requests")
    client = Client(app({"tiny": worker}, key="s3cret"))
    headers = {"Authorization": "Bearer s3cret"}
    body = {"model": "tiny", "prompt": "my secret text", "max_tokens": 3, "ignore_eos": True}
    whole = client("POST", "/v1/completions", json=body, headers=headers).json()
    client("POST", "/v1/completions", json=body | {"stream": True}, headers=headers)
    client("POST", "/v1/completions", json=body | {"model": "evil\nmodel"}, headers=headers)
    client("POST", "/v1/completions", json=body)
    client("GET", "/health")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    asked = whole["usage"]["prompt_tokens"]
    assert re.fullmatch(
        rf"id={whole['id']} model=tiny key=server in={asked} out=3 cached=0 ms=\d+ status=200 outcome=ok",
        lines[0],
    )
    assert f"in={asked} out=3" in lines[1]
    assert "model=- key=server in=0 out=0" in lines[2] and "status=404 outcome=refused" in lines[2]
    assert "key=- " in lines[3] and "status=401" in lines[3]
    text = "\n".join(lines)
    assert "secret text" not in text and "s3cret" not in text and "evil" not in text
    assert whole["choices"][0]["text"] not in text


def test_the_log_says_when_a_client_left(worker: Worker, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "herdbook.requests")
    body = b'{"model":"tiny","prompt":[5,6],"max_tokens":400,"ignore_eos":true,"stream":true}'
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
    }

    async def go() -> None:
        begun = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await begun.wait()
            return {"type": "http.disconnect"}

        async def send(message) -> None:
            if message["type"] == "http.response.body":
                begun.set()

        await app({"tiny": worker})(scope, receive, send)

    asyncio.run(asyncio.wait_for(go(), 20))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "status=200 outcome=gone" in line and "model=tiny" in line and "in=2 " in line


def test_a_bug_in_a_stream_is_told_and_counted(caplog: pytest.LogCaptureFixture):
    counts, api = Counts(), FastAPI()
    api.add_middleware(Visits, counts=counts)

    async def events() -> AsyncGenerator[str, None]:
        yield data({"first": 1})
        raise KeyError("my secret text")

    @api.get("/stream")
    async def stream() -> Response:
        return EventStream(events(), {})

    text = Client(api)("GET", "/stream").text
    first, last, rest = text.split("\n\n")
    assert first == 'data: {"first":1}' and rest == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "secret" not in text and "a stream failed" in caplog.text
    assert counts.visits == {("", "failed"): 1}
