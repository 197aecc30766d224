"""What a client may ask of the server, and what is refused rather than silently ignored.

The shapes are OpenAI's (https://platform.openai.com/docs/api-reference). A request falls into one
of three drawers:

- keys that Herdbook obeys: the fields of `ChatAsk` and `CompletionAsk`, with `top_k`, `min_p`,
  `repetition_penalty`, `min_tokens`, `stop_token_ids`, `prompt_logprobs`, `priority`,
  `structured_outputs` and `guided_…` as extensions (vLLM's);
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

from dataclasses import replace
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from herdbook.engine.request import MOST_LOGPROBS, Sampling
from herdbook.errors import RequestError, nearest
from herdbook.serving.messages import Messages, Prompts, Text
from herdbook.serving.structured import Structured
from herdbook.serving.tools import MOST_CALLS, Choose, Tool, Tools, grammar

MAX_CHOICES = 16  # n, and n × prompts of one completion request
MAX_STOPS = 4  # OpenAI's limit

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


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk with the sums; `continuous_usage_stats`: sums in each chunk."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


Alternatives = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]  # the lower, the more urgent
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
    priority: Priority | None = None

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
                raise ValueError(f"must map token ids to numbers; {key!a:.80} is no token id")
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

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Tools | None = None
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
    max_tokens: int | None = Field(None, ge=0)  # 0: the prompt is read, and nothing said
    echo: bool | None = None
    logprobs: Alternatives | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _say_something(self) -> CompletionAsk:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("'max_tokens' is 0, and without \"echo\": true nothing would be told")
        return self

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


def _hint(key: str, known: list[str]) -> str:
    hint = nearest(key, known)
    return hint if hint.startswith("did you mean") else "it had no effect"
