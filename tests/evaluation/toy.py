"""A model whose likelihoods stand in a table, for scores that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from herdbook.engine.request import Reply, Request
from herdbook.engine.score import Score


class Letters:
    """A tokenizer: one character, one id."""

    bos_id, eos_id, chat_template, stop_strings = 0, None, None, ()

    def encode(self, text: str) -> list[int]:
        return [ord(one) for one in text]

    def prompt(self, text: str) -> list[int]:
        return [0, *self.encode(text)]

    def token_bytes(self, id: int) -> bytes:
        return chr(id).encode()


class ToyEngine:
    """Each character's log-likelihood by a table, whatever is before it; replies by a function."""

    def __init__(
        self, table: Mapping[str, float], reply: Callable[[Request], str], most: int
    ) -> None:
        self.table, self.reply, self.most_tokens = table, reply, most
        self.asked: list[str] = []

    def forget(self) -> None:
        pass

    def score_many(self, asked: Sequence[Any]) -> list[list[Score]]:
        self.asked += ["".join(map(chr, prompt[1:])) for prompt, _ in asked]
        return [
            [Score(tuple(self.table.get(chr(id), -9.0) for id in ids), False) for ids in several]
            for _, several in asked
        ]

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        self.asked += ["".join(map(chr, one.ids[1:])) for one in requests]
        return [Reply(self.reply(one), (1,), "stop", 1, 0, 0.0, 0.0) for one in requests]


def toy(
    table: Mapping[str, float] | None = None,
    reply: Callable[[Request], str] = lambda request: "",
    most: int = 10_000,
) -> Any:
    """What scoring needs of a LoadedModel."""
    return SimpleNamespace(
        engine=ToyEngine(table or {}, reply, most),
        tokenizer=Letters(),
        written=lambda text: text,
        model=SimpleNamespace(whole_prompts=False),
    )
