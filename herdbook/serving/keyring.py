"""Who may ask, and how much: the keys that open the server, each with its limits.

One key may come from the command line or HERDBOOK_API_KEY; the others are those of the book
(`herd keys`), read again every `REFRESH_S` seconds, so that a revoked key soon opens nothing.

A limit is a bucket that holds one minute's worth and refills steadily. A request takes one from its
bucket. Tokens are known only afterwards, so a request passes while its token bucket is not empty and
is charged when it ends, possibly into debt: over the minutes the limit holds, whatever one request
took.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import sqlite3
import time
from collections.abc import Callable

from herdbook.book.keys import Key, Keys, hash_key
from herdbook.serving.problems import Refusal

REFRESH_S = 2.0
Clock = Callable[[], float]


class Bucket:
    """Holds `per_minute` at most and gains as much in a minute."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.size, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    @property
    def level(self) -> float:
        now = self._clock()
        gained = (now - self._at) * self.size / 60
        self._level, self._at = min(self.size, self._level + gained), now
        return self._level

    def take(self, amount: int) -> None:
        self._level = self.level - amount

    def seconds_to(self, level: float) -> float:
        return max(0.0, level - self.level) * 60 / self.size


class Pass:
    """An accepted key: its name, and what is left of its limits."""

    def __init__(
        self,
        name: str,
        requests: int | None = None,
        tokens: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.name, self.limits = name, (requests, tokens)
        self._requests = Bucket(requests, clock) if requests else None
        self._tokens = Bucket(tokens, clock) if tokens else None

    def begin(self) -> None:
        """Take one request, or raise a 429 that says when to come back."""
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None and bucket.level < 1:
                wait = bucket.seconds_to(1)
                raise Refusal(
                    429,
                    f"the key {self.name!r} has used its {what}:",
                    rule=f"at most {bucket.size} a minute",
                    next=f"try again in {wait:.1f} s",
                    code="rate_limit_exceeded",
                    retry_s=wait,
                )
        if self._requests is not None:
            self._requests.take(1)

    def used(self, tokens: int) -> None:
        """A request has ended and took so many tokens, prompt and reply."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's: the limits, what is left, and when they are whole again."""
        found = {}
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{what}"] = str(bucket.size)
                found[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(bucket.level)))
                found[f"x-ratelimit-reset-{what}"] = f"{bucket.seconds_to(bucket.size):.3f}s"
        return found


class KeyRing:
    """All keys that are accepted. `needed`: whether a request without one is refused.

    Once a key was needed it stays so: revoking the last one closes the server, not opens it.
    """

    def __init__(
        self, key: str | None = None, keys: Keys | None = None, clock: Clock = time.monotonic
    ) -> None:
        self._keys, self._clock = keys, clock
        self._fixed = {hash_key(key): Pass("server")} if key else {}
        self._passes: dict[str, Pass] = {}
        self._read_at = -math.inf
        self.needed = bool(self._fixed)
        self._read()

    async def find(self, key: str) -> Pass | None:
        """The pass of this key; None when it opens nothing."""
        if self._keys is not None and self._clock() - self._read_at >= REFRESH_S:
            await asyncio.to_thread(self._read)
        given, found = hash_key(key), None
        for known, one in {**self._passes, **self._fixed}.items():
            if hmac.compare_digest(known, given):  # all of them, equally long
                found = one
        return found

    async def look(self) -> None:
        """A server that needs no key yet needs one as soon as the book has one."""
        await self.find("")

    def _read(self) -> None:
        if self._keys is None:
            return
        try:
            live = self._keys.all(live=True)
        except sqlite3.Error as error:  # closed until it can be read: one of them may be revoked
            raise Refusal(
                503, f"the book's keys cannot be read ({error})", code="keys_unavailable"
            ) from error
        self._passes = {key.hash: self._pass(key) for key in live}
        self._read_at = self._clock()
        self.needed = self.needed or bool(self._passes)

    def _pass(self, key: Key) -> Pass:
        limits = (key.requests_per_minute, key.tokens_per_minute)
        known = self._passes.get(key.hash)
        if known is not None and known.limits == limits:
            return known
        return Pass(key.name, *limits, self._clock)
