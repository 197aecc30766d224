"""Keys and limits at the door: who comes in, how often, and how soon a revoked key is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from herdbook.book.book import Book
from herdbook.book.keys import Keys
from herdbook.serving.api import app
from herdbook.serving.keyring import REFRESH_S, KeyRing, Pass
from herdbook.serving.problems import Refusal
from herdbook.serving.worker import Worker

from .conftest import Client


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ask(client: Client, key: str, **body: object):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4} | body
    return client("POST", "/v1/completions", json=body, headers=bearer(key))


def test_requests_a_minute_refill_steadily():
    time = Time()
    one = Pass("alice", requests=2, clock=time)
    one.begin()
    one.begin()
    with pytest.raises(Refusal, match="has used its requests") as refused:
        one.begin()
    assert refused.value.status == 429 and refused.value.retry_s == pytest.approx(30)
    time.now += 30
    one.begin()
    time.now += 3600  # never more than a minute's worth
    assert one.headers()["x-ratelimit-remaining-requests"] == "2"


def test_tokens_are_charged_afterwards_and_may_go_into_debt():
    time = Time()
    one = Pass("alice", tokens=60, clock=time)
    one.begin()
    one.used(120)
    assert one.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(Refusal) as refused:
        one.begin()
    assert refused.value.retry_s == pytest.approx(61)  # 60 s for the debt, one for the next token
    time.now += 61
    one.begin()


def test_a_limited_key(worker: Worker, book: Book):
    key = Keys(book).add("alice", requests_per_minute=2, tokens_per_minute=10_000)
    client = Client(app({"tiny": worker}, ring=KeyRing(keys=Keys(book), clock=Time())))
    first = ask(client, key)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "10000"
    assert ask(client, key, model="nope").status_code == 404  # counts as well
    third = ask(client, key)
    assert third.status_code == 429 and 1 <= int(third.headers["retry-after"]) <= 30
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert client("GET", "/v1/models", headers=bearer(key)).status_code == 200  # costs nothing
    used = first.json()["usage"]["total_tokens"]
    assert third.headers["x-ratelimit-remaining-tokens"] == str(10_000 - used)


def test_tokens_of_a_stream_are_charged_too(worker: Worker, book: Book):
    key = Keys(book).add("alice", tokens_per_minute=5)
    client = Client(app({"tiny": worker}, ring=KeyRing(keys=Keys(book), clock=Time())))
    assert ask(client, key, stream=True, max_tokens=12).status_code == 200
    assert ask(client, key).status_code == 429


def test_tokens_of_embeddings_are_charged_too(worker: Worker, book: Book):
    key = Keys(book).add("alice", tokens_per_minute=10)
    client = Client(app({"tiny": worker}, ring=KeyRing(keys=Keys(book), clock=Time())))
    body = {"model": "tiny", "input": [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]}
    first = client("POST", "/v1/embeddings", json=body, headers=bearer(key))
    assert first.status_code == 200 and first.json()["usage"]["total_tokens"] == 10
    second = client("POST", "/v1/embeddings", json=body, headers=bearer(key))
    assert second.status_code == 429
    assert second.headers["x-ratelimit-remaining-tokens"] == "0"


def test_a_revoked_key_is_refused_within_seconds_and_the_door_stays_shut(
    worker: Worker, book: Book
):
    time = Time()
    keys = Keys(book)
    key = keys.add("alice")
    client = Client(app({"tiny": worker}, ring=KeyRing(keys=keys, clock=time)))
    assert ask(client, key).status_code == 200
    keys.revoke("alice")
    time.now += REFRESH_S
    assert ask(client, key).status_code == 401
    assert client("GET", "/v1/models").status_code == 401
    new = keys.add("alice")
    time.now += REFRESH_S
    assert ask(client, new).status_code == 200


def test_the_first_key_shuts_a_running_server(worker: Worker, book: Book):
    time = Time()
    client = Client(app({"tiny": worker}, ring=KeyRing(keys=Keys(book), clock=time)))
    assert client("GET", "/v1/models").status_code == 200
    Keys(book).add("alice")
    time.now += REFRESH_S
    assert client("GET", "/v1/models").status_code == 401


def test_the_servers_own_key_works_beside_the_books(worker: Worker, book: Book):
    key = Keys(book).add("alice")
    client = Client(app({"tiny": worker}, ring=KeyRing("s3cret", Keys(book))))
    assert ask(client, key).status_code == ask(client, "s3cret").status_code == 200
    assert ask(client, "s3cret2").status_code == 401


def test_limits_outlive_a_reading_of_the_book(book: Book):
    time = Time()
    key = Keys(book).add("alice", requests_per_minute=5)
    ring = KeyRing(keys=Keys(book), clock=time)

    async def twice():
        first = await ring.find(key)
        time.now += REFRESH_S
        Keys(book).add("bob")
        return first, await ring.find(key)

    first, second = asyncio.run(twice())
    assert first is second is not None


def test_a_book_that_cannot_be_read_opens_nothing(worker: Worker, book: Book):
    time = Time()
    key = Keys(book).add("alice")
    client = Client(app({"tiny": worker}, ring=KeyRing(keys=Keys(book), clock=time)))
    Path(book.home / "book.db").write_bytes(b"no database" * 1000)
    time.now += REFRESH_S
    response = ask(client, key)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "keys_unavailable"


def test_all_but_the_page_and_health_wants_the_key(worker: Worker):
    client = Client(app({"tiny": worker}, key="s3cret"))
    assert client("GET", "/health").status_code == client("GET", "/").status_code == 200
    for method, path in (
        ("GET", "/metrics"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/v1/models/tiny"),
        ("GET", "/nothing"),
        ("GET", "/health/"),
    ):
        assert client(method, path).status_code == 401, path
