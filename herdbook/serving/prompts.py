"""From what a client sent to the token ids that the model reads, and back; nothing is truncated."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from herdbook.engine.engine import Engine
from herdbook.serving.messages import ChatMessage, Prompt
from herdbook.serving.problems import Refusal
from herdbook.serving.tools import Tool, explained, native
from herdbook.tokens.chat import render
from herdbook.tokens.tokenizer import Tokenizer


def tokenizer_of(engine: Engine) -> Tokenizer:
    """The model's tokenizer, or a Refusal that says what can be done without one."""
    if engine.tokenizer is None:
        raise Refusal(
            400,
            "this model came without a tokenizer",
            next="send token ids to /v1/completions, or serve a folder with tokenizer.json",
        )
    return engine.tokenizer


def rendered(
    engine: Engine,
    turns: Sequence[ChatMessage],
    callable: Sequence[Tool] = (),
    *,
    reply: bool = True,
) -> list[int]:
    """A conversation by the model's own template, up to where the reply begins. callable: the tools
    that it may call."""
    tokenizer = tokenizer_of(engine)
    rows = [turn.row() for turn in turns]
    tools = [tool.model_dump(exclude_unset=True) for tool in callable]
    if not native(tokenizer.chat_template):
        rows, tools = explained(rows, tools), []
    return render(tokenizer, rows, reply=reply, tools=tools, now=datetime.now()).ids


def encoded(engine: Engine, prompt: Prompt, param: str = "prompt") -> list[int]:
    """A text, or ids that are checked, as ids. param: the client's key for them."""
    if isinstance(prompt, str):
        return tokenizer_of(engine).prompt(prompt)
    for id in prompt:
        if not 0 <= id < engine.intake.vocab:
            raise Refusal(
                400,
                f"token id {id}",
                rule=f"is outside the vocabulary of {engine.intake.vocab} tokens",
                next="encode the prompt with this model's own tokenizer",
                param=param,
            )
    return prompt


def decoded(engine: Engine, prompt: Prompt, ids: list[int] | None = None) -> str:
    """The prompt as it was sent, as text, or as its tokens `ids` spell it: what `echo` gives back."""
    if isinstance(prompt, str):
        return prompt if ids is None else tokenizer_of(engine).decode(ids, specials=False)
    return tokenizer_of(engine).decode(prompt if ids is None else ids, specials=True)


def budget(engine: Engine, prompt: int, limit: int | None, param: str) -> int:
    """How many tokens the reply may have; refuses what does not fit instead of cutting it."""
    room = engine.most_tokens - prompt
    if room < (1 if limit is None else limit):
        asked = "" if limit is None else f" and {limit} of reply"
        raise Refusal(
            400,
            f"{prompt} tokens of prompt{asked}",
            rule=f"do not fit the context of {engine.most_tokens} tokens",
            next="shorten the prompt" if room < 1 else f"ask for at most {room} tokens of reply",
            code="context_length_exceeded",
            param=param,
        )
    return room if limit is None else limit
