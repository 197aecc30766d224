"""From tokens to text that may be shown: whole characters only, and no part of a stop string.

A stop string may arrive in bits: with stop "\\n\\nUser" and the text "Hello.\\n\\nUs", the "\\n\\nUs"
is held back until it is certain whether the stop follows.

>>> held("Hello.\\n\\nUs", ("\\n\\nUser",))
4

Some models write a line break as a backslash and an n, since their vocabulary has no other (ChatYuan);
their chat template does so with what they read, and it is undone in what they say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Stream(Protocol):
    """What `Tokenizer.stream()` gives."""

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


def held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return n
    return 0


#: what a template may write otherwise → how
_ESCAPES = {"\n": "\\n", "\t": "\\t"}


def escapes(template: str | None) -> dict[str, str]:
    """What this template writes otherwise, as its own filters say.

    >>> escapes(r"{{ content | replace('\\n', '\\\\n') }}")
    {'\\n': '\\\\n'}
    """
    return {
        meant: written
        for meant, written in _ESCAPES.items()
        if template and f"replace({meant!r}, {written!r})" in template
    }


class TextOut:
    """Collects the text of one reply. `stream` is None where there is no tokenizer.

    trim: without the blanks it begins with. escaped: what the model writes otherwise → how; stop
    strings are as the model writes.
    """

    def __init__(
        self,
        stream: Stream | None,
        stops: Sequence[str],
        *,
        trim: bool = False,
        escaped: Mapping[str, str] | None = None,
    ) -> None:
        self._stream, self._stops, self._trim = stream, tuple(stops), trim
        self._escaped = dict(escaped or {})
        self._parts: list[str] = []  # handed out
        self._tail = ""  # held back
        self.stopped = False  # a stop string has come

    @property
    def text(self) -> str:
        """All that was handed out."""
        return "".join(self._parts)

    def push(self, token: int, *, free: bool = False) -> str:
        """The text that this token makes certain (often ""). free: no stop string counts yet."""
        return self._add(self._stream.push(token), free) if self._stream else ""

    def flush(self) -> str:
        """The rest, when no more tokens come: held-back text was no stop string after all."""
        if self.stopped or self._stream is None:
            return ""
        rest = self._add(self._stream.flush())
        if not self.stopped:
            rest += self._hand_out(self._tail)
            self._tail = ""
        return rest

    def _add(self, text: str, free: bool = False) -> str:
        stops = () if free else self._stops
        if not stops and not self._escaped:
            return self._hand_out(text)
        text = self._tail + text
        ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        if ends:
            self.stopped, self._tail = True, ""
            return self._hand_out(text[: min(ends)])
        keep = held(text, stops)
        keep += held(text[: len(text) - keep], tuple(self._escaped.values()))
        self._tail = text[len(text) - keep :]
        return self._hand_out(text[: len(text) - keep])

    def _hand_out(self, text: str) -> str:
        if self._trim and not self._parts:
            text = text.lstrip()
        for meant, written in self._escaped.items():
            text = text.replace(written, meant)
        if text:
            self._parts.append(text)
        return text
