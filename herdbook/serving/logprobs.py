"""Logprobs as OpenAI writes them down, and vLLM those of a prompt.

What is promised: the strings of a reply's tokens, joined, are its text, streamed or not. So a token's
string is the text that it makes certain. "🦙" may be three tokens: the first two have "" (their
`bytes` say which), the third the whole character. The token that ends a reply is not listed, nor what
belongs to a stop string; a token that a stop string begins in is listed with what stands before it.
Of a special token within a reply, which is no text, `bytes` is null.

A logprob of -inf is written -9999.0, since JSON has no such number (OpenAI's way too).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from herdbook.engine.request import Logprob, Piece
from herdbook.tokens.tokenizer import Tokenizer

LEAST = -9999.0


@dataclass
class Token:
    """One token of a text: what it adds to it, and where."""

    text: str
    start: int  # characters
    logprob: Logprob | None  # None: the first of a prompt
    data: bytes | None  # None: no text of its own

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Listing:
    """Lists a reply's tokens as their text is handed out.

    ends: tokens that end a reply. trim: the blanks that it begins with are left out. escaped: the
    engine writes some of it otherwise; then a token's string is what its step handed out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        ends: Collection[int] = (),
        *,
        trim: bool = False,
        escaped: bool = False,
    ) -> None:
        self._tokenizer, self._ends, self._trim = tokenizer, ends, trim
        self._stream = tokenizer.stream() if tokenizer and not escaped else None
        self._waiting: deque[Token] = deque()  # spelled, not handed out
        self._spelled = self._shown = 0

    def took(self, piece: Piece) -> list[Token]:
        """The tokens whose text is out now that `piece` is."""
        self._shown += len(piece.text)
        for logprob in piece.logprobs:
            if logprob.id not in self._ends:
                text = self._stream.push(logprob.id) if self._stream else piece.text
                self._spell(text, logprob)
        if piece.finish is not None and self._stream and self._waiting:
            self._waiting[-1].text += self._stream.flush()
        if self._tokenizer is None:
            return self._all()
        out: list[Token] = []
        # What has no text yet waits for more: the rest of a character, or the end. A stop string ends
        # a reply before its own tokens, a limit behind the last one.
        cut_off = piece.finish == "length"
        while self._waiting and (cut_off or self._waiting[0].start < self._shown):
            if self._waiting[0].end > self._shown:
                if piece.finish is None:
                    break
                self._cut(self._waiting[0])
            out.append(self._waiting.popleft())
        return out

    def _spell(self, text: str, logprob: Logprob) -> None:
        data: bytes | None = None
        if self._tokenizer and logprob.id not in self._tokenizer.special_ids:
            data = self._tokenizer.token_bytes(logprob.id)
            first = not self._spelled and self._tokenizer.codec.strip
            if first and data.startswith(b" ") and not text.startswith(" "):
                data = data[1:]
        if self._trim and not self._spelled and text != text.lstrip():
            text = text.lstrip()
            data = text.encode()
        self._waiting.append(Token(text, self._spelled, logprob, data))
        self._spelled += len(text)

    def _cut(self, token: Token) -> None:
        token.text = token.text[: self._shown - token.start]
        token.data = token.text.encode()

    def _all(self) -> list[Token]:
        out = list(self._waiting)
        self._waiting.clear()
        return out


def prompt_tokens(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[Logprob | None], specials: bool
) -> list[Token]:
    """A prompt's tokens; specials: those that are no text are spelled too."""
    stream = tokenizer.stream(specials=specials)
    out: list[Token] = []
    at = 0
    for id, logprob in zip(ids, logprobs, strict=True):
        out.append(Token(stream.push(id), at, logprob, tokenizer.token_bytes(id)))
        at = out[-1].end
    out[-1].text += stream.flush()
    return out


def chat(tokens: Sequence[Token], top: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """choices[].logprobs of a chat reply. top: how many alternatives are listed."""
    content = []
    for token in tokens:
        assert token.logprob is not None
        data = None if token.data is None else list(token.data)
        one = {"token": token.text, "logprob": _number(token.logprob.logprob), "bytes": data}
        one["top_logprobs"] = [
            {
                "token": _spelling(tokenizer, id),
                "logprob": _number(logprob),
                "bytes": list(tokenizer.token_bytes(id)),
            }
            for id, logprob in token.logprob.top[:top]
        ]
        content.append(one)
    return {"content": content, "refusal": None}


def completion(
    tokens: Sequence[Token], top: int, tokenizer: Tokenizer | None, offset: int = 0
) -> dict[str, Any]:
    """choices[].logprobs of a completion. offset: characters before the first token.

    Among the alternatives is always the token itself, so they are `top` or one more.
    """
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        known = token.logprob
        best: dict[str, float] = {}
        for id, logprob in (*known.top[:top], (known.id, known.logprob)) if known else ():
            best.setdefault(_key(tokenizer, id), _number(logprob))
        tops.append(best if known else None)
    return {
        "tokens": [
            token.text if tokenizer or not token.logprob else _nameless(token.logprob.id)
            for token in tokens
        ],
        "token_logprobs": [
            None if token.logprob is None else _number(token.logprob.logprob) for token in tokens
        ],
        "top_logprobs": tops,
        "text_offset": [offset + token.start for token in tokens],
    }


def of_prompt(
    logprobs: Sequence[Logprob | None], top: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token but the first, {id: logprob, rank, decoded_token}."""
    out: list[dict[str, Any] | None] = []
    for known in logprobs:
        if known is None:
            out.append(None)
            continue
        rows = [(id, logprob, rank) for rank, (id, logprob) in enumerate(known.top[:top], start=1)]
        if known.id not in (id for id, _, _ in rows):
            rows.append((known.id, known.logprob, known.rank))
        out.append(
            {
                str(id): {
                    "logprob": _number(logprob),
                    "rank": rank,
                    "decoded_token": _spelling(tokenizer, id) if tokenizer else None,
                }
                for id, logprob, rank in rows
            }
        )
    return out


def _number(logprob: float) -> float:
    return max(logprob, LEAST)


def _spelling(tokenizer: Tokenizer, id: int) -> str:
    data = tokenizer.token_bytes(id)
    return data.decode("utf-8", errors="replace") if data else _nameless(id)


def _key(tokenizer: Tokenizer | None, id: int) -> str:
    """A token's name among alternatives: parts of characters keep apart by their bytes."""
    data = tokenizer.token_bytes(id) if tokenizer else b""
    if not data:
        return _nameless(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _nameless(id: int) -> str:
    """Where there is no tokenizer, and of a row of the head without a token."""
    return f"token_id:{id}"
