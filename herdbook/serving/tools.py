"""Tools: functions that a model may ask its client to call, in OpenAI's shapes.

A call is written by the model as Hermes and Qwen do:

    <tool_call>
    {"name": "weather", "arguments": {"city": "北京"}}
    </tool_call>

Where the model's chat template writes this form itself, it renders tools, calls and their results. To
any other model the form is explained in the system message, and results come as what the user says.
With `tool_choice` "required" or a function's name, a grammar makes the model call, with arguments that
fit the function's schema; with "auto" it may, and what is not a call of a known function with a JSON
object stays text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from herdbook.engine.grammar import BLANKS, Grammar
from herdbook.engine.text import held
from herdbook.serving.messages import Name, json_object, whole

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_TOOLS = 128
MOST_CALLS = 8  # that a grammar lets a model write at once
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

EXPLAINED = """\
You may call functions to help with what the user asks. These are the functions:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as JSON:
<tool_call>
{{"name": "…", "arguments": {{…}}}}
</tool_call>"""


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["function"]
    function: Function


def _whole_tools(tools: list[Tool]) -> list[Tool]:
    for tool in tools:
        try:
            whole(json.dumps(tool.model_dump(), ensure_ascii=False))
        except RecursionError:
            raise ValueError("are nested too deep") from None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError("hold two functions of the same name")
    return tools


Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS), AfterValidator(_whole_tools)]


class Wanted(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    name: str


class Choose(BaseModel):
    """`tool_choice` of one function."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["function"]
    function: Wanted


def native(template: str | None) -> bool:
    """Whether a chat template renders tools, and in the form above."""
    said = template or ""
    return "tools" in said and OPEN in said and '"arguments"' in said and "<function=" not in said


def explained(
    rows: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The conversation without roles and keys of tools: for a template that knows none."""
    out: list[dict[str, Any]] = []
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        out.append({"role": "system", "content": EXPLAINED.format(tools=lines)})
    for at, row in enumerate(rows):
        role, content = row["role"], row["content"]
        if role == "system" and at == 0 and out:
            out[0]["content"] = f"{content}\n\n{out[0]['content']}"
            continue
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if at and rows[at - 1]["role"] == "tool":
                out[-1]["content"] += "\n" + content
                continue
            role = "user"
        calls = [
            json.dumps(call["function"], ensure_ascii=False) for call in row.get("tool_calls", ())
        ]
        said = [content] if content or not calls else []
        content = "\n".join(said + [f"{OPEN}\n{call}\n{CLOSE}" for call in calls])
        out.append({"role": role, "content": content})
    return out


def grammar(tools: Sequence[Tool], most: int) -> Grammar:
    """One to `most` calls of these functions, with arguments that fit."""
    rules = [
        "start: call" + (f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""),
        "call: " + " | ".join(f"call{at}" for at in range(len(tools))),
    ]
    end = json.dumps("}\n" + CLOSE)
    for at, tool in enumerate(tools):
        start = f'{OPEN}\n{{"name": "{tool.function.name}", "arguments": '
        schema = tool.function.parameters or NOTHING
        schema = {**schema, "x-guidance": {"whitespace_pattern": BLANKS}}
        rules += [
            f"call{at}: {json.dumps(start)} arguments{at} {end}",
            f"arguments{at}: %json {json.dumps(schema, ensure_ascii=False)}",
        ]
    return Grammar("lark", "\n".join(rules))


class Calls:
    """Takes the calls out of a reply as it comes. names: the functions that are known."""

    def __init__(self, names: Collection[str], most: int | None) -> None:
        self._names, self._most = names, most
        self._rest = ""  # read, not handed out
        self._inside = self._after = False  # of a call; right behind one
        self._blanks = ""  # before the call
        self.calls: list[dict[str, Any]] = []

    def push(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """The text that is no call, and the calls that are whole now. last: nothing follows."""
        self._rest += text
        content, count = "", len(self.calls)
        while True:
            if self._inside:
                body, end, after = self._rest.partition(CLOSE)
                if not end and not (last and self._read(body)):
                    break
                self._inside, self._rest = False, after
                call = self._read(body)
                self._after = call is not None
                if call is None:
                    content += self._blanks + OPEN + body + CLOSE
                elif self._most is None or len(self.calls) < self._most:
                    self.calls.append(call)
                continue
            if self._after:
                self._rest = self._rest.lstrip()
                self._after = not self._rest
            before, start, after = self._rest.partition(OPEN)
            if not start:
                sure = self._rest[: len(self._rest) - held(self._rest, (OPEN,))].rstrip()
                content, self._rest = content + sure, self._rest[len(sure) :]
                break
            content += before.rstrip()
            self._blanks = before[len(before.rstrip()) :]
            self._inside, self._rest = True, after
        if last:
            content += (self._blanks + OPEN if self._inside else "") + self._rest
            self._rest, self._inside = "", False
        return content, self.calls[count:]

    def _read(self, body: str) -> dict[str, Any] | None:
        said = json_object(body)
        if said is None or said.get("name") not in self._names:
            return None
        arguments = said.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json_object(arguments)
        if not isinstance(arguments, dict):
            return None
        function = {
            "name": said["name"],
            "arguments": json.dumps(arguments, ensure_ascii=False),
        }
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
