"""What a client gives the model to read: the messages of a chat, the prompts of a completion.

Types are strict, and whatever a model could not be shown as it was sent is refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

MAX_MESSAGES = 2048


def whole(text: str) -> str:
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


Text = Annotated[str, AfterValidator(whole)]
Prompt = Text | list[int]
Prompts = Annotated[list[Prompt], BeforeValidator(_several)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, if it is one of whole characters."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # half a character is a ValueError too
        return None
    return found if isinstance(found, dict) else None


class Part(BaseModel):
    """One element of a `content` list: `{"type": "text", "text": "…"}`."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: str
    text: Text


class Called(BaseModel):
    """What a call says: `arguments` is the text of a JSON object."""

    model_config = ConfigDict(strict=True, extra="ignore")
    name: Name
    arguments: str

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> Called:
        if json_object(self.arguments) is None:
            raise ValueError("'arguments' must be the text of a JSON object")
        return self


class Call(BaseModel):
    """A call in an assistant's earlier turn."""

    model_config = ConfigDict(strict=True, extra="ignore")
    id: str
    type: Literal["function"]
    function: Called

    def row(self) -> dict[str, Any]:
        """As templates take it: arguments as an object."""
        arguments = json_object(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


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


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
