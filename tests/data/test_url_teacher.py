"""A teacher behind a URL, against a server of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from herdbook.data.records import Message
from herdbook.data.teacher import Ask
from herdbook.data.url_teacher import UrlTeacher
from herdbook.errors import ConfigError, FetchError

Reply = tuple[int, Any, dict[str, str]]
ASK = Ask((Message("system", "Be brief."), Message("user", "3")), 17, 0.7, 5)


def good(text: str, finish: str = "stop") -> Any:
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}]}


class Server:
    """Answers by a script, and keeps what it was sent."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], str | None]] = []
        self.script: Callable[[dict[str, Any], int], Reply] = lambda body, n: (200, good("ok"), {})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.seen.append((body, self.headers.get("authorization")))
                assert self.path == "/v1/chat/completions"
                status, value, headers = outer.script(body, len(outer.seen))
                raw = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in {**headers, "content-length": str(len(raw))}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not for this machine
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def test_what_it_sends_and_reads(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    server.script = lambda body, n: (
        200, good(body["messages"][-1]["content"], "length" if "4" in str(body) else "stop"), {},
    )  # fmt: skip
    asks = [ASK, *(Ask((Message("user", str(n)),)) for n in (4, 1))]
    found = UrlTeacher(server.url + "/", "cria", key_from="MY_KEY").generate(asks)
    assert [(one.text, one.finished) for one in found] == [("3", True), ("4", False), ("1", True)]
    body, key = next(one for one in server.seen if one[0]["seed"] == 5)
    assert key == "Bearer sesame"
    assert body == {
        "model": "cria", "max_tokens": 17, "temperature": 0.7, "seed": 5,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3"}],
    }  # fmt: skip


def test_tries_again_as_long_as_the_server_asks(server: Server) -> None:
    waits: list[float] = []
    first = (429, {"error": {"message": "slow down"}}, {"retry-after": "7"})
    server.script = lambda body, n: (
        first if n == 1 else (503, b"", {}) if n < 4 else (200, good("x"), {})
    )
    (found,) = UrlTeacher(server.url, "m", sleep=waits.append).generate([ASK])
    assert found.text == "x" and waits == [7, 2, 4]


@pytest.mark.parametrize(
    ("reply", "tried", "says"),
    [
        ((401, {"error": {"message": "wrong key sesame"}}, {}), 1, r"401: wrong key \[key\]"),
        ((200, b"[" * 9_000_000, {}), 1, "is no chat completion"),
        ((404, b"<html>", {}), 1, "status 404: <html>"),
        ((500, b"", {}), 3, r"status 500:  \(tried 3 times\)"),
        ((200, b"hello", {}), 1, "is no chat completion"),
        ((200, {"choices": []}, {}), 1, "is no chat completion"),
        ((200, {"choices": [{"message": {"content": 3}}]}, {}), 1, "content is no text"),
    ],
)
def test_errors_say_what_happened_and_never_the_key(
    server: Server, monkeypatch: pytest.MonkeyPatch, reply: Reply, tried: int, says: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    server.script = lambda body, n: reply
    with pytest.raises(FetchError, match=says) as failed:
        UrlTeacher(server.url, "m", tries=3, sleep=lambda _: None).generate([ASK])
    assert len(server.seen) == tried
    told = f"{failed.value}{failed.value.__cause__}{UrlTeacher(server.url, 'm')!r}"
    assert "sesame" not in told and "127.0.0.1" in told


def test_no_server_and_no_place_for_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with pytest.raises(FetchError, match="ConnectError"):
        UrlTeacher("http://127.0.0.1:9/v1", "m", tries=2, sleep=lambda _: None).generate([ASK])
    for url in ("ftp://x/v1", "x/v1", "https://me:sesame@host/v1"):
        with pytest.raises(ConfigError, match="must be http") as failed:
            UrlTeacher(url, "m").generate([ASK])
        assert "sesame" not in str(failed.value)
    with pytest.raises(ConfigError, match=r"not sent over plain http to example\.org"):
        UrlTeacher("http://example.org/v1", "m").generate([ASK])
