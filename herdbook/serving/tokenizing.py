"""POST /tokenize and /detokenize, in vLLM's shapes: what the model reads, before it is asked.

    {"model": "luna", "prompt": "Hi"}       → {"count": 1, "max_model_len": 8192, "tokens": [25477], …}
    {"model": "luna", "messages": [{…}]}    → the same, by the model's own chat template
    {"model": "luna", "tokens": [25477]}    → {"prompt": "Hi"}

`model` may be left out where one model is served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from pydantic import BaseModel, ConfigDict, model_validator

from herdbook.engine.engine import Engine
from herdbook.serving.messages import Messages, Text
from herdbook.serving.problems import Refusal
from herdbook.serving.prompts import decoded, encoded, rendered, tokenizer_of
from herdbook.serving.tools import Tools
from herdbook.serving.worker import Worker

Served = Callable[[Http, str], Awaitable[Worker]]


class TokenizeAsk(BaseModel):
    """A text or a conversation, with the tools that it may call. add_generation_prompt: up to where the reply begins."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True  # of a text: what the tokenizer puts in front of it
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeAsk:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give 'prompt' or 'messages', one of them")
        if self.tools and self.messages is None:
            raise ValueError("'tools' belong to 'messages'")
        return self


class DetokenizeAsk(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None
    tokens: list[int]


def add(api: FastAPI, models: Mapping[str, Worker], served: Served) -> None:
    """Put both routes into the application."""

    async def worker(http: Http, name: str | None) -> Worker:
        if name is None and len(models) > 1:
            raise Refusal(
                400,
                "no model was named",
                rule="and several are served",
                next="add one: " + ", ".join(map(repr, models)),
                param="model",
            )
        return await served(http, next(iter(models)) if name is None else name)

    @api.post("/tokenize")
    async def tokenize(ask: TokenizeAsk, http: Http) -> dict[str, Any]:
        engine = (await worker(http, ask.model)).engine
        ids = await asyncio.to_thread(_ids, engine, ask)
        tokenizer = tokenizer_of(engine)
        strings = [tokenizer.decode([id], specials=True) for id in ids]
        return {
            "count": len(ids),
            "max_model_len": engine.most_tokens,
            "tokens": ids,
            "token_strs": strings if ask.return_token_strs else None,
        }

    @api.post("/detokenize")
    async def detokenize(ask: DetokenizeAsk, http: Http) -> dict[str, Any]:
        engine = (await worker(http, ask.model)).engine
        return {"prompt": decoded(engine, encoded(engine, ask.tokens, "tokens"))}


def _ids(engine: Engine, ask: TokenizeAsk) -> list[int]:
    tokenizer = tokenizer_of(engine)
    if ask.prompt is not None:
        whole = ask.add_special_tokens
        return tokenizer.prompt(ask.prompt) if whole else tokenizer.encode(ask.prompt)
    return rendered(engine, ask.messages or (), ask.tools or (), reply=ask.add_generation_prompt)
