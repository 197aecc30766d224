"""A teacher behind a URL: any server that speaks OpenAI's chat completions, one of ours included."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from herdbook.data.teacher import Answer, Ask
from herdbook.errors import ConfigError, FetchError

#: worth another try: too many requests, and the server's own troubles
_AGAIN = {408, 429, 500, 502, 503, 504}
#: longest wait between two tries, most bytes of a reply
_WAIT_S, _MOST = 60.0, 8_000_000
_HERE = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class UrlTeacher:
    """`url` is the API's base («http://127.0.0.1:8000/v1»), `model` the name that the server knows.

    The key is read from the environment variable that `key_from` names, and goes nowhere but into the
    request's header: not over plain http to another machine, not into an error. A request that fails
    for the server's reasons is tried again, `tries` times in all, after 1, 2, 4 … seconds or what the
    server asks for. Errors: FetchError.
    """

    url: str
    model: str
    key_from: str = "OPENAI_API_KEY"
    at_once: int = 8
    tries: int = 5
    seconds: float = 300.0
    sleep: Callable[[float], None] = time.sleep

    def generate(self, asks: Sequence[Ask], /) -> list[Answer]:
        """Answers in the order of the asks, `at_once` of them on their way together."""
        import httpx

        headers = self._headers()
        # of this machine, nothing goes through a proxy that the environment names
        away = urlsplit(self.url).hostname not in _HERE
        with (
            httpx.Client(headers=headers, timeout=self.seconds, trust_env=away) as client,
            ThreadPoolExecutor(self.at_once) as pool,
        ):
            waiting = [pool.submit(self._answer, client, ask) for ask in asks]
            try:
                return [one.result() for one in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _headers(self) -> dict[str, str]:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ConfigError(
                f"teacher URL {parts.scheme}://{parts.hostname or ''}",
                rule="must be http(s)://host[:port]/v1, without a name or password",
                next=f"put a key into the environment as {self.key_from}",
            )
        key = os.environ.get(self.key_from, "")
        if not key:
            return {}
        if parts.scheme == "http" and parts.hostname not in _HERE:
            raise ConfigError(
                f"the key in {self.key_from}",
                rule=f"is not sent over plain http to {parts.hostname}",
                next=f"use https, or unset {self.key_from}",
            )
        return {"Authorization": f"Bearer {key}"}

    def _answer(self, client: Any, ask: Ask) -> Answer:
        import httpx

        body = {
            "model": self.model,
            "messages": [message.to_json() for message in ask.messages],
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "seed": ask.seed,
        }
        why, wait = "", 1.0
        for attempt in range(self.tries):
            if attempt:
                self.sleep(min(wait, _WAIT_S))
                wait = 2.0**attempt
            try:
                with client.stream(
                    "POST", self.url.rstrip("/") + "/chat/completions", json=body
                ) as reply:
                    raw = _bounded(reply)
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}"
                continue
            if reply.status_code == 200:
                return self._read(raw)
            why = f"status {reply.status_code}: {_message(raw)}"
            if reply.status_code not in _AGAIN:
                raise self._failed(why, "mend the request, the model's name or the key")
            wait = max(wait, _seconds(reply.headers.get("retry-after", "")))
        raise self._failed(f"{why} (tried {self.tries} times)", "is the server there? try again")

    def _read(self, raw: bytes) -> Answer:
        try:
            choice = json.loads(raw)["choices"][0]
            text = choice["message"]["content"]
            if text is not None and not isinstance(text, str):
                raise ValueError("content is no text")
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            why = f"is no chat completion ({type(error).__name__}: {error})"
            raise self._failed(why, "is this an OpenAI-compatible API?") from None
        return Answer(text or "", finished=choice.get("finish_reason") == "stop")

    def _failed(self, why: str, next_: str) -> FetchError:
        key = os.environ.get(self.key_from, "")
        if key:  # a server may repeat it
            why = why.replace(key, "[key]")
        host = urlsplit(self.url).netloc.rpartition("@")[2]
        return FetchError(f"teacher {self.model!r} at {host}:", rule=why[:400], next=next_)


def _bounded(reply: Any) -> bytes:
    """The body, as far as a reply may reach: what is cut is no JSON."""
    raw = bytearray()
    for part in reply.iter_bytes():
        raw += part
        if len(raw) > _MOST:
            break
    return bytes(raw[:_MOST])


def _message(raw: bytes) -> str:
    """What the server says went wrong."""
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return raw.decode("utf-8", "replace")


def _seconds(text: str) -> float:
    """Retry-After in seconds; its other form, a date, counts as none."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0
