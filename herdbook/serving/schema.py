"""What a client may ask of the server, and what is refused rather than silently ignored.

The shapes are OpenAI's (https://platform.openai.com/docs/api-reference). A request falls into one
of three drawers:

- keys that Herdbook obeys: the fields of `ChatAsk` and `CompletionAsk`, with `top_k`, `min_p`,
  `repetition_penalty`, `min_tokens`, `stop_token_ids`, `prompt_logprobs`, `structured_outputs` and
  `guided_…` as extensions (vLLM's);
- OpenAI's keys that would change the reply, but that Herdbook cannot obey yet (`audio`,
  `functions` …): refused with status 400, unless their value asks for nothing (`"functions": []`);
- anything else: ignored, and the response says so in the header `X-Herdbook-Warning`.

>>> ask = ChatAsk.model_validate({"model": "luna", "messages": [{"role": "user", "content": "Hi"}]})
>>> ask.messages[0].content
'Hi'

Types are strict: `"temperature": "0.5"` is refused, since a client that sends it has a bug.
`null` means the same as a missing key, as with OpenAI.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from herdbook.engine.request import MOST_LOGPROBS, Sampling
from herdbook.errors import RequestError, nearest
from herdbook.serving.structured import Structured
from herdbook.serving.tools import MOST_CALLS, MOST_TOOLS, Call, Choose, Tool, grammar

MAX_CHOICES = 16  # n, and n × prompts of one completion request
MAX_STOPS = 4  # OpenAI's limit
MAX_MESSAGES = 2048

# Known to OpenAI, would change the reply, not obeyed here: name -> values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),  # of a chat; a completion obeys it
    "function_call": ("none", "auto"),  # OpenAI's older way; `tools` is obeyed
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # of a completion; a chat obeys it
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# Bookkeeping for a hosted service: no influence on the reply, so no warning either.
HARMLESS = frozenset(
    [
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    ]
)


def _whole(text: str) -> str:
    """JSON can spell half a character ("\\ud800"); no tokenizer can read one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half a character (a lone surrogate) at {error.start}") from None
    return text


def _several(prompt: Any) -> Any:
    """Text, list of texts, list of ids, list of lists of ids → list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            "must be a string, a list of strings, a list of token ids or a list of such lists"
        )
    if all(_is_id(item) for item in prompt):
        return [prompt]
    if all(isinstance(item, str) for item in prompt):
        return prompt
    for item in prompt:
        if not isinstance(item, list) or not item or not all(map(_is_id, item)):
            raise ValueError(
                "mixes kinds: give strings only, token ids only, or non-empty lists of ids only"
            )
    return prompt


Text = Annotated[str, AfterValidator(_whole)]
Prompt = Text | list[int]
Prompts = Annotated[list[Prompt], BeforeValidator(_several)]


class Part(BaseModel):
    """One element of a `content` list: `{"type": "text", "text": "…"}`."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: str
    text: Text


class ChatMessage(BaseModel):
    """One turn. `developer` is OpenAI's newer word for `system` and is rendered as such.

    A `tool` tells what a call returned; an assistant that calls may say nothing besides.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: Text
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _calls_may_be_all(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("tool_calls") and given.get("content") is None:
            return {**given, "content": ""}
        return given

    @field_validator("role", mode="after")
    @classmethod
    def _known_role(cls, role: str) -> str:
        if role == "function":
            raise ValueError("role 'function' is not supported; use 'tool'")
        if role not in ("system", "developer", "user", "assistant", "tool"):
            raise ValueError(
                f"role {role!r} is not known; use 'system', 'developer', 'user', 'assistant' or 'tool'"
            )
        return "system" if role == "developer" else role

    @field_validator("content", mode="before")
    @classmethod
    def _text_of_parts(cls, content: Any) -> Any:
        """A list of text parts becomes one string; a string stays; all else is refused."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise ValueError("must be a string or a list of text parts")  # noqa: TRY004  pydantic's way
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise ValueError('every part must be like {"type": "text", "text": …}')  # noqa: TRY004
            if part["type"] != "text":
                raise ValueError(f"part of type {part['type']!r} is not supported; only 'text' is")
        return "".join(Part.model_validate(part).text for part in content)

    @model_validator(mode="after")
    def _calls_where_they_belong(self) -> ChatMessage:
        for key in ("function_call", "audio"):
            if (self.model_extra or {}).get(key):
                raise ValueError(f"{key!r} is not supported yet")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"'tool_calls' are the assistant's, not those of {self.role!r}")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("'tool_call_id' belongs to role 'tool', and is required there")
        return self

    def row(self) -> dict[str, Any]:
        """As chat templates take it."""
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            row["tool_calls"] = [call.row() for call in self.tool_calls]
        if self.tool_call_id is not None:
            row["tool_call_id"] = self.tool_call_id
        return row


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk with the sums; `continuous_usage_stats`: sums in each chunk."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


Alternatives = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]


class Ask(Structured):
    """What chat and completion requests have in common."""

    model_config = ConfigDict(strict=True, extra="allow")
    _warnings: list[str] = PrivateAttr(default_factory=list)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: list[Text] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0.0, le=1.0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0.0, le=1.0, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0.0, le=10.0, allow_inf_nan=False)
    ignore_eos: bool | None = None
    logit_bias: dict[str, Bias] | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[TokenId] | None = None
    prompt_logprobs: Alternatives | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list):
            if len(stops) > MAX_STOPS:
                raise ValueError(f"holds {len(stops)} strings; at most {MAX_STOPS} are allowed")
            if "" in stops:
                raise ValueError("holds an empty string, which would stop every reply at once")
        elif stops is not None:
            raise ValueError("must be a string or a list of strings")
        return stops

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"must map token ids to numbers; {_short(key)} is no token id")
        return bias

    @model_validator(mode="after")
    def _sort_the_rest(self) -> Ask:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("'prompt_logprobs' come with a whole reply only; leave out 'stream'")
        if self.grammar is not None and self.min_tokens:
            raise ValueError("'min_tokens' cannot be: the form asked for says where the reply ends")
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed together with \"stream\": true")
        known = [*type(self).model_fields, *UNSUPPORTED]
        for key, value in (self.model_extra or {}).items():
            if key in HARMLESS or value is None:
                continue
            if key in UNSUPPORTED:
                if not any(
                    type(value) is type(idle) and value == idle for idle in UNSUPPORTED[key]
                ):
                    raise ValueError(f"{key!r} is not supported yet; leave it out")
            else:
                self._warnings.append(f"ignored unknown key {key!r}; {_hint(key, known)}")
        return self

    @property
    def warnings(self) -> list[str]:
        """What was ignored, one sentence each."""
        return self._warnings

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def draws(self) -> int:
        """Replies that are made for each prompt; the best `choices` of them are told."""
        return self.choices

    @property
    def told(self) -> int | None:
        """How many alternatives of each token are told; None: no logprobs at all."""
        raise NotImplementedError

    def sampling(self, *, max_tokens: int, choice: int) -> Sampling:
        """The engine's settings for one choice.

        What the request does not name keeps `Sampling`'s default, so a request without
        `temperature` is answered greedily, as `herd chat` and the reports do: the same question
        gets the same reply, and what was measured is what is served. (OpenAI's default of 1.0
        makes a small model ramble; a client that wants variety names a temperature.)

        With a seed, choice i is drawn with seed + i: the choices differ, and each can be drawn
        again. Without one, every request is another draw.
        """
        names = ["temperature", "top_p", "top_k", "min_p", "ignore_eos"]
        names += ["presence_penalty", "frequency_penalty", "repetition_penalty"]
        names += ["min_tokens", "stop_token_ids"]
        if choice == 0:  # once for a prompt
            names.append("prompt_logprobs")
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if asked.get("top_k") == -1:  # vLLM's way of saying «all»
            asked["top_k"] = 0
        seed = None if self.seed is None else (self.seed + choice) % 2**63
        stop = tuple(self.stop or ())
        asked["grammar"] = self.grammar
        asked["logit_bias"] = {int(id): bias for id, bias in (self.logit_bias or {}).items()}
        asked["logprobs"] = 0 if self.told is None and self.draws > self.choices else self.told
        return Sampling(**asked, max_tokens=max_tokens, seed=seed, stop=stop)


class ChatAsk(Ask):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Any = None  # "none", "auto", "required" or a `Choose`
    parallel_tool_calls: bool | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _a_choice(cls, given: Any) -> Any:
        if given is None or given in ("none", "auto", "required"):
            return given
        try:
            return Choose.model_validate(given)
        except ValidationError:
            raise ValueError(
                'must be "none", "auto", "required" or '
                '{"type": "function", "function": {"name": "…"}}'
            ) from None

    @field_validator("tools", mode="after")
    @classmethod
    def _whole_tools(cls, tools: list[Tool] | None) -> list[Tool] | None:
        for tool in tools or ():
            try:
                _whole(json.dumps(tool.model_dump(), ensure_ascii=False))
            except RecursionError:
                raise ValueError("are nested too deep") from None
        names = [tool.function.name for tool in tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("hold two functions of the same name")
        return tools

    @model_validator(mode="after")
    def _choose_what_is_there(self) -> ChatAsk:
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, Choose) and self.tool_choice.function.name not in names:
            name = self.tool_choice.function.name
            raise ValueError(f"'tool_choice' names {name!r}, which is not among 'tools'")
        if self.tool_choice == "required" and not names:
            raise ValueError("'tool_choice' is 'required', but there are no 'tools'")
        if self.callable and self._grammar is not None:
            raise ValueError(
                "tools and a form for the reply cannot be had together; "
                'leave one out, or send "tool_choice": "none"'
            )
        if self.callable and self.tool_choice not in (None, "auto"):
            try:
                self._grammar = grammar(self.callable, self.most_calls or MOST_CALLS)
            except RequestError as error:
                raise ValueError(f"'tools': {error.what} {error.rule}") from error
            if self.min_tokens:
                raise ValueError("'min_tokens' cannot be: a call of a tool ends by itself")
        return self

    @property
    def callable(self) -> list[Tool]:
        """The tools that this reply may call."""
        if isinstance(self.tool_choice, Choose):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == name]
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def most_calls(self) -> int | None:
        """The most calls in one reply; None: as many as it makes."""
        return (
            1 if isinstance(self.tool_choice, Choose) or self.parallel_tool_calls is False else None
        )

    @model_validator(mode="after")
    def _both_or_none(self) -> ChatAsk:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs \"logprobs\": true")
        return self

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatAsk:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise ValueError(
                f"'max_tokens' is {old} but 'max_completion_tokens' is {new}; name one of them"
            )
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of the reply, if the client named a limit."""
        limit = self.max_completion_tokens
        return self.max_tokens if limit is None else limit


class CompletionAsk(Ask):
    """POST /v1/completions. One prompt or several, as text or as token ids."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Alternatives | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _few_choices(self) -> CompletionAsk:
        if self.draws < self.choices:
            raise ValueError(f"'best_of' is {self.best_of}, less than 'n' = {self.n}")
        if self.draws > self.choices and self.stream:
            raise ValueError("'best_of' cannot be streamed: the best is known at the end")
        if len(self.prompt) * self.draws > MAX_CHOICES:
            name = "n" if self.best_of is None else "best_of"
            raise ValueError(
                f"{len(self.prompt)} prompts × {name} = {self.draws} are more than {MAX_CHOICES} "
                "choices; send several requests"
            )
        return self

    @property
    def draws(self) -> int:
        return self.choices if self.best_of is None else self.best_of

    @property
    def told(self) -> int | None:
        return self.logprobs

    def sampling(self, *, max_tokens: int, choice: int) -> Sampling:
        one = super().sampling(max_tokens=max_tokens, choice=choice)
        if not self.echo or self.logprobs is None or choice:
            return one
        return replace(one, prompt_logprobs=max(self.logprobs, self.prompt_logprobs or 0))

    @property
    def limit(self) -> int:
        """OpenAI's default of 16: a plain completion has no natural end."""
        return 16 if self.max_tokens is None else self.max_tokens


def explain(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Pydantic's errors → (one sentence, the key that it is about).

    >>> explain([{"loc": ("body", "messages", 0, "role"), "type": "missing"}])
    ("'messages[0].role' is required", 'messages[0].role')
    """
    error = errors[0]
    path = [part for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        reason = (error.get("ctx") or {}).get("error", "")
        return f"the body is not valid JSON: {reason} (at character {path[0]})", None
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    param = param.lstrip(".")
    if not param:
        if error["type"] == "value_error":  # our own sentence about several keys
            return str(error["ctx"]["error"]), None
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    if error["type"] == "missing":
        return f"{param!r} is required", param
    reason = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"]
    return f"{param!r}: {reason[:1].lower()}{reason[1:]} (received {_short(error['input'])})", param


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _hint(key: str, known: list[str]) -> str:
    hint = nearest(key, known)
    return hint if hint.startswith("did you mean") else "it had no effect"


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
