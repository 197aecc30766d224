"""What OpenAI's clients rely on, spoken as bytes over a socket to a real server.

The checks are those that the suites of vLLM, SGLang and llama.cpp's server make, in our own words.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from herdbook.serving.api import app
from herdbook.serving.server import listen
from herdbook.serving.worker import Worker

HI = [{"role": "user", "content": "hello"}]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
Answer = tuple[int, dict[str, str], bytes]


class Server:
    """The application on a port of this machine."""

    def __init__(self, worker: Worker, key: str | None = None) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(app({"tiny": worker}, key=key), log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve([self.listener])), daemon=True
        )
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)

    def __call__(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """POST with a body, GET without."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            if body is None:
                line.request("GET", path, headers=headers or {})
            else:
                sent = body if isinstance(body, bytes) else json.dumps(body).encode()
                kind = {"Content-Type": "application/json"}
                line.request("POST", path, sent, {**kind, **(headers or {})})
            answer = line.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            line.close()

    def raw(self, request: bytes) -> bytes:
        """What comes back for these very bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as line:
            line.sendall(request)
            parts = []
            with contextlib.suppress(
                ConnectionResetError
            ):  # it did not read the request to its end
                while part := line.recv(65536):
                    parts.append(part)
            return b"".join(parts)

    def chat(self, **keys: Any) -> Answer:
        return self(CHAT, {"model": "tiny", "messages": HI, "max_tokens": 12} | keys)

    def complete(self, **keys: Any) -> Answer:
        return self(COMPLETE, {"model": "tiny", "prompt": "hello", "max_tokens": 12} | keys)


@pytest.fixture(scope="module")
def server(worker: Worker) -> Iterator[Server]:
    one = Server(worker)
    yield one
    one.stop()


def events(answer: Answer) -> list[dict[str, Any]]:
    status, headers, body = answer
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), body
    *lines, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error(answer: Answer, status: int) -> dict[str, Any]:
    assert answer[0] == status, answer
    body = json.loads(answer[2])
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def alive(server: Server) -> None:
    assert server.chat()[0] == 200


# -- what is refused, and that the server lives on --------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "hello",
        42,
        [],
        [[]],
        [{"role": "user"}],
        [{"role": 1, "content": "hello"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"text": "hello"}]}],
    ],
)
def test_malformed_messages_are_400(server: Server, messages: Any):
    found = error(server.chat(messages=messages), 400)
    assert found["type"] == "invalid_request_error" and found["param"].startswith("messages")
    alive(server)


@pytest.mark.parametrize(
    "keys",
    [
        {"temperature": -1},
        {"temperature": "0.5"},
        {"top_p": 0},
        {"n": 0},
        {"n": 1000},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": [""]},
        {"presence_penalty": 3},
        {"min_p": 2},
        {"top_k": -2},
        {"seed": 2**70},
        {"stream": "yes"},
        {"messages": HI * 3000},
    ],
)
def test_wrong_values_are_400_and_named(server: Server, keys: dict[str, Any]):
    found = error(server.chat(**keys), 400)
    (name,) = keys
    assert found["param"].startswith(name) and name in found["message"]
    alive(server)


def test_stream_options_need_a_stream(server: Server):
    for post in (server.chat, server.complete):
        assert "stream" in error(post(stream_options={"include_usage": True}), 400)["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_prompt_is_refused_with_the_numbers(server: Server, stream: bool):
    found = error(server.complete(prompt=[5] * 600, stream=stream), 400)
    assert found["code"] == "context_length_exceeded"
    assert "600" in found["message"] and "512" in found["message"]
    alive(server)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model":"tiny","model":', b"[" * 50_000]
)
def test_bodies_that_are_no_request(server: Server, body: bytes):
    for path in (CHAT, COMPLETE, "/tokenize", "/detokenize"):
        error(server(path, body), 400)
    alive(server)


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00",
        b"GARBAGE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http(server: Server, request_: bytes):
    answer = server.raw(request_)
    assert not answer or answer.split()[1] in (b"400", b"431")
    alive(server)


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"127.0.0.1.evil.example",
        b"localhost.",
        b"localhost:80:80",
        b"127.0.0.1:80@evil.example",
        b"127.0.0.1/evil.example",
        b"evil.example#127.0.0.1",
        b"[::1",
        b"[::1]evil.example",
        b"::1",
        b"0.0.0.0",
        b"127.1",
        b"localhost:",
        b"localhost:123456",
        b"a b",
        b"\xff",
        b"",
        b"127.0.0.1, evil.example",
    ],
)
def test_only_this_machines_names_pass_and_only_well_written(server: Server, host: bytes):
    """A browser that was led here by another's domain name sends that name."""
    request = b"GET /v1/models HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % host
    assert server.raw(request).split()[1] in (b"400", b"403")
    for good in (b"localhost:%d" % server.port, b"LOCALHOST", b"127.0.0.1", b"[::1]:80"):
        request = b"GET /v1/models HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % good
        assert server.raw(request).split()[1] == b"200"


def test_a_request_without_a_host_or_with_two(server: Server):
    for hosts in (b"", b"Host: 127.0.0.1\r\nHost: 127.0.0.1\r\n"):
        answer = server.raw(b"GET /v1/models HTTP/1.0\r\n" + hosts + b"\r\n")
        assert answer.split()[1] in (b"400", b"403")


def test_the_key(worker: Worker):
    server = Server(worker, key="s3cret")
    try:
        assert error(server("/v1/models"), 401)["code"] == "invalid_api_key"
        for wrong in ("Bearer s3cre", "Bearer s3crets", "Bearer", "s3cret", "Bearer \xff"):
            error(server("/v1/models", headers={"Authorization": wrong}), 401)
        error(server.chat(), 401)
        assert server("/health")[0] == 200
        assert server("/v1/models", headers={"Authorization": "Bearer s3cret"})[0] == 200
    finally:
        server.stop()


# -- replies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"temperature": 1.0, "seed": 7}, {"n": 3, "seed": 1}])
def test_a_stream_says_what_the_whole_reply_says(server: Server, keys: dict[str, Any]):
    whole = json.loads(server.chat(**keys)[2])["choices"]
    parts = events(server.chat(stream=True, **keys))
    assert len({part["id"] for part in parts}) == 1
    texts, ends = [""] * len(whole), [[] for _ in whole]
    for part in parts:
        (choice,) = part["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        ends[choice["index"]] += [choice["finish_reason"]] * bool(choice["finish_reason"])
    assert texts == [choice["message"]["content"] for choice in whole]
    assert ends == [[choice["finish_reason"]] for choice in whole]


def test_usage_in_streams(server: Server):
    whole = json.loads(server.chat()[2])["usage"]
    *parts, last = events(server.chat(stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and all(part["usage"] is None for part in parts)
    assert last["usage"]["total_tokens"] == whole["total_tokens"]
    always = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = events(server.chat(stream=True, stream_options=always))
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"]


def test_no_stop_string_leaks(server: Server):
    """Not even the beginning of one that goes on otherwise is held back in the end."""
    text = json.loads(server.chat(ignore_eos=True)[2])["choices"][0]["message"]["content"]
    for at in range(1, len(text) - 2):
        stop = text[at : at + 3]
        expected = text[: text.index(stop)]
        keys = {"stop": [stop, stop + "\x00"], "ignore_eos": True}
        (choice,) = json.loads(server.chat(**keys)[2])["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
        parts = [part["choices"][0] for part in events(server.chat(stream=True, **keys))]
        assert "".join(part["delta"].get("content", "") for part in parts) == expected


def test_ignore_eos_fills_the_length(server: Server):
    for seed in range(4):
        keys = {"temperature": 1.5, "seed": seed, "ignore_eos": True, "max_tokens": 40}
        body = json.loads(server.complete(**keys)[2])
        assert body["usage"]["completion_tokens"] == 40
        assert body["choices"][0]["finish_reason"] == "length"


def test_a_seed_draws_the_same_again_whoever_else_asks(server: Server):
    keys = {"temperature": 1.2, "seed": 3, "max_tokens": 24}
    alone = json.loads(server.chat(**keys)[2])["choices"]
    others = [threading.Thread(target=server.chat, kwargs={"max_tokens": 60}) for _ in range(4)]
    for other in others:
        other.start()
    assert json.loads(server.chat(**keys)[2])["choices"] == alone
    for other in others:
        other.join()


def test_prompts_as_text_and_as_ids_through_tokenize(server: Server):
    found = json.loads(server("/tokenize", {"model": "tiny", "prompt": "hello 你好"})[2])
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 512
    assert found["token_strs"] is None
    assert json.loads(server("/detokenize", {"tokens": found["tokens"]})[2])["prompt"] == (
        "hello 你好"
    )
    text, ids = server.complete(prompt="hello 你好"), server.complete(prompt=found["tokens"])
    assert json.loads(text[2])["choices"] == json.loads(ids[2])["choices"]

    strings = {"messages": HI, "return_token_strs": True}
    chat = json.loads(server("/tokenize", strings)[2])
    assert "".join(chat["token_strs"]) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert json.loads(server.chat()[2])["usage"]["prompt_tokens"] == chat["count"]
    plain = json.loads(server("/tokenize", {"messages": HI, "add_generation_prompt": False})[2])
    assert plain["tokens"] == chat["tokens"][: plain["count"]] != chat["tokens"]


def test_wrong_tokenize_requests(server: Server):
    error(server("/tokenize", {}), 400)
    error(server("/tokenize", {"prompt": "a", "messages": HI}), 400)
    error(server("/tokenize", {"model": "nope", "prompt": "a"}), 404)
    assert "vocabulary" in error(server("/detokenize", {"tokens": [10**9]}), 400)["message"]


def test_each_response_has_an_id(server: Server):
    for answer in (server.chat(), server.chat(n=0), server("/nothing"), server("/v1/models")):
        assert answer[1]["x-request-id"]
    answer = server.chat()
    assert answer[1]["x-request-id"] == json.loads(answer[2])["id"]


@pytest.mark.parametrize(
    "keys",
    [
        {"n": 3},
        {"n": 3, "stream": True},
        {"best_of": 4},
        {"guided_regex": "[ab]{400}", "ignore_eos": None},
        {"logprobs": 3, "echo": True, "stream": True},
        {"input": [[at % 300] * 500 for at in range(600)]},
    ],
)
def test_hanging_up_frees_the_pages(server: Server, worker: Worker, keys: dict[str, Any]):
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 480, "ignore_eos": True} | keys
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    kind = {"Content-Type": "application/json"}
    path = "/v1/embeddings" if "input" in keys else COMPLETE
    before = worker.engine.stats()
    line.request("POST", path, json.dumps(body), kind)
    if body.get("stream"):
        line.getresponse().read(20)
    end = time.monotonic() + 20
    while not worker.open and time.monotonic() < end:
        time.sleep(0.001)
    assert worker.open
    assert line.sock is None or line.sock.close() is None
    line.close()
    while time.monotonic() < end:
        stats = worker.engine.stats()
        if not (worker.open or stats["running"] or stats["waiting"] or stats["pages_used"]):
            draws = body.get("n", body.get("best_of", 1))
            assert stats["completion_tokens"] - before["completion_tokens"] < 480 * draws
            assert stats["requests"] - before["requests"] < 600
            return
        time.sleep(0.01)
    raise AssertionError(f"still busy: {worker.open=} {stats}")
