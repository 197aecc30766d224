"""Foreign instruction data, recognised by content and read strictly.

======== ================================================================= ===================
format   one row                                                           roles
======== ================================================================= ===================
Alpaca   {"instruction": "Add.", "input": "2 and 3", "output": "5"}        –
Dolly    {"instruction": "Add.", "context": "2 and 3", "response": "5"}    –
GPT4All  {"prompt": "Add 2 and 3.", "response": "5"}                       –
Firefly  {"input": "Add 2 and 3.", "target": "5"} (BELLE's, too)           –
ShareGPT {"conversations": [{"from": "human", "value": "Hi"}, …]}          human, gpt, system, …
OpenAI   {"messages": [{"role": "user", "content": "Hi"}, …]}              user, assistant, system
SMILE    {"dialogue": [{"role": "client", "content": "Hi"}, …]}            client, counselor
======== ================================================================= ===================

each as JSON (an array of rows) or JSONL (a row a line), plain or gzip; names of files count for
nothing. JSONL is split at "\\n" alone, since texts hold U+2028 and its like.

Two kinds of fault are told apart. A row that **breaks the format** (no JSON, a missing key, a number
where text belongs, another format than the rows before it) refuses the whole file, naming the line:
it was not what its owner thinks it is. A row that keeps the format but **cannot be trained on** (an
empty answer: Alpaca's published file has 28; a chat that begins in the middle of another: 4 in 10 of
ShareGPT's) is trimmed or left out, and counted by reason. A file in which nothing is left is refused.

A pair becomes a chat by the model's own template, not by Alpaca's prompt: the user says instruction,
blank line, input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from herdbook.data.records import Conversation, Message
from herdbook.data.rows import EXPECTED, rows
from herdbook.errors import DataError

ROLES = {
    "ShareGPT": {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    },
    "OpenAI": {
        "user": "user",
        "assistant": "assistant",
        "system": "system",
        "developer": "system",
    },
    "SMILE": {"client": "user", "counselor": "assistant"},
}
#: roles that the formats know, but conversations of ours do not (yet)
TOOL_ROLES = {"tool", "function", "function_call", "observation"}
#: formats of one question and one answer: their keys of task, what it is about, and answer
PAIRS = {
    "Alpaca": ("instruction", "input", "output"),
    "Dolly": ("instruction", "context", "response"),
    "GPT4All": ("prompt", "", "response"),
    "Firefly": ("input", "", "target"),
}
#: the key by which a row of chats is known
KEYS = {
    "conversations": "ShareGPT",
    "messages": "OpenAI",
    "dialogue": "SMILE",
}


@dataclass
class Parsed:
    """What a file held: `rows` = kept conversations + the sum of `skipped`."""

    format: str
    conversations: list[Conversation] = field(default_factory=list)
    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason → rows left out
    trimmed: Counter[str] = field(default_factory=Counter)  # reason → rows shortened


def read(path: Path | str) -> list[Conversation]:
    """The conversations of a user's file."""
    return parse(path).conversations


def parse(path: Path | str) -> Parsed:
    """The conversations of a user's file, with the count of what was left out and why."""
    parsed = Parsed(format="")
    parsed.conversations.extend(stream(path, parsed))
    return parsed


def stream(path: Path | str, parsed: Parsed) -> Iterator[Conversation]:
    """The conversations, one at a time; what is not in one is counted in `parsed` meanwhile."""
    path = Path(path)
    first_line = kept = 0
    for line, place, row in rows(path):

        def broken(found: str, expected: str, place: str = place) -> DataError:
            return DataError(
                f"{path}, {place}: {found}",
                rule=expected,
                next="mend or take out that row; nothing was changed",
            )

        name = _recognise(row, broken)
        if not parsed.format:
            parsed.format, first_line = name, line
        elif name != parsed.format:
            raise broken(
                f"a row of the {name} format",
                f"in a file that began as {parsed.format} (line {first_line}): one format a file",
            )
        parsed.rows += 1
        try:
            messages = _pair(row, name, broken) if name in PAIRS else _chat(row, name, broken)
            messages, trims = _tidy(messages)
        except _Unusable as reason:
            parsed.skipped[str(reason)] += 1
            continue
        parsed.trimmed.update(trims)
        kept += 1
        yield Conversation(tuple(messages), {"line": line})
    if not parsed.rows:
        raise DataError(f"{path} holds no row", rule=EXPECTED, next="give another file")
    if not kept:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in parsed.skipped.most_common())
        raise DataError(
            f"{path}: none of its {parsed.rows} rows can be trained on ({reasons})",
            rule="where a row needs a question and an answer",
            next="give another file; nothing was changed",
        )


class _Unusable(Exception):
    """A well-formed row that cannot be trained on; the text is the reason."""


Broken = Callable[[str, str], DataError]  # (found, expected) → error that names the row


# ---------------------------------------------------------------------------------- rows to chats


def _recognise(row: Any, broken: Broken) -> str:
    if not isinstance(row, Mapping):
        raise broken(_kind(row), EXPECTED)
    if "chosen" in row and "rejected" in row:
        raise broken(
            "a preference pair (chosen, rejected)",
            "where conversations with one answer each were expected",
        )
    known = [name for key, name in KEYS.items() if key in row]
    pairs = [name for name, (task, _, answer) in PAIRS.items() if task in row and answer in row]
    known += pairs or (["Alpaca"] if "instruction" in row else [])
    keys = "{" + ", ".join(map(str, row)) + "}"
    if not known:
        raise broken(f"a row with the keys {keys}", EXPECTED)
    if len(known) > 1:
        raise broken(f"a row with the keys {keys}", "mixes formats: one format a row")
    return known[0]


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "nothing (null)" if value is None else "an object")


def _pair(row: Mapping[str, Any], name: str, broken: Broken) -> list[Message]:
    keys = PAIRS[name]
    if keys[2] not in row:
        raise broken(f"a row with {keys[0]!r} but without {keys[2]!r}", EXPECTED)
    texts: list[str] = []
    for key in keys:
        value = row.get(key)
        if value is None and key == keys[1]:
            value = ""
        if not isinstance(value, str):
            raise broken(f"'{key}' is {_kind(value)}", "where text was expected")
        texts.append(value)
    task, given, answer = texts
    if not task.strip():
        raise _Unusable("empty instruction")
    if not answer.strip():
        raise _Unusable("empty answer")
    user = f"{task}\n\n{given}" if given.strip() else task
    return [Message("user", user), Message("assistant", answer)]


def _chat(row: Mapping[str, Any], name: str, broken: Broken) -> list[Message]:
    role_key, text_key = ("from", "value") if name == "ShareGPT" else ("role", "content")
    key = next(key for key, format_ in KEYS.items() if format_ == name)
    turns = row[key]
    if not isinstance(turns, list):
        raise broken(f"'{key}' is {_kind(turns)}", "where a list of turns was expected")
    if row.get("label") is False:
        raise _Unusable("labelled as a bad answer")
    messages, tools = [], False
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise broken(
                f"turn {number} is {_kind(turn)}", f"where {role_key} and {text_key} were expected"
            )
        if role_key not in turn or not (text_key in turn or "tool_calls" in turn):
            keys = "{" + ", ".join(map(str, turn)) + "}"
            raise broken(
                f"turn {number} has the keys {keys}",
                f"where {role_key} and {text_key} were expected",
            )
        role, text = turn[role_key], turn.get(text_key)
        if role in TOOL_ROLES or "tool_calls" in turn or "function_call" in turn:
            tools = True
            continue
        if not isinstance(role, str) or role not in ROLES[name]:
            raise broken(
                f"turn {number} is by {role!r}",
                f"where one of {', '.join(ROLES[name])} was expected",
            )
        messages.append(Message(ROLES[name][role], _content(text, number, text_key, broken)))
    if tools:
        raise _Unusable("uses tools")
    return messages


def _content(value: Any, number: int, key: str, broken: Broken) -> str:
    """Text, or OpenAI's list of parts where all parts are text."""
    if isinstance(value, list):
        parts: list[str] = []
        for part in value:
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise broken(
                    f"turn {number}: '{key}' is a list of {_kind(part)}",
                    "where parts were expected",
                )
            if part["type"] != "text":
                raise _Unusable("holds pictures or sound")
            if not isinstance(text := part.get("text"), str):
                raise broken(f"turn {number}: a text part without text", "where text was expected")
            parts.append(text)
        return "".join(parts)
    if not isinstance(value, str):
        raise broken(f"turn {number}: '{key}' is {_kind(value)}", "where text was expected")
    return value


def _tidy(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """Question first, answer last, by turns between; the reasons for what was cut off."""
    trims = []
    messages = [Message(m.role, m.content.lstrip("\r\n").rstrip()) for m in messages]
    system = [m for m in messages[:1] if m.role == "system" and m.content]
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if any(m.role == "system" for m in turns):
        raise _Unusable("a system turn in the middle")
    if any(not m.content for m in turns):
        raise _Unusable("an empty turn")
    if any(_lone_surrogate(m.content) for m in messages):
        raise _Unusable("half a character (lone surrogate)")
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
        trims.append("began with an answer")
    if any(a.role == b.role for a, b in pairwise(turns)):
        raise _Unusable("two turns of one side in a row")
    if turns and turns[0].role == "assistant":
        raise _Unusable("two turns of one side in a row")
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
        trims.append("ended without an answer")
    if not turns:
        raise _Unusable("no question with an answer")
    return system + turns, trims


def _lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
