"""Replies of a form that the client asks for, and calls of its tools."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdbook.serving.tools import CLOSE, OPEN, Calls, Tool, explained, grammar, native
from herdbook.serving.worker import Worker
from herdbook.tokens.chat import render
from herdbook.tokens.tokenizer import Tokenizer

from .conftest import Client, chunks, tiny_engine
from .test_api import HI, error

WARM = {"temperature": 1.2, "seed": 1, "max_tokens": 150}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["北京", "Bern"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def worker(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """The tiny model with room for a system message about tools."""
    folder = tmp_path_factory.mktemp("roomy") / "tiny"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    one = Worker("tiny", lambda: tiny_engine(folder))
    one.start()
    yield one.wait(60)
    one.stop(grace_s=0)


def said(response: Any) -> tuple[str | None, str]:
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["message"]["content"], choice["finish_reason"]


def streamed(response: Any) -> tuple[str, list[dict[str, Any]], str | None]:
    """Text, calls and end of a streamed choice."""
    text, calls, end = "", [], None
    for part in chunks(response):
        (choice,) = part["choices"]
        text += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", []):
            assert call.pop("index") == len(calls)
            calls.append(call)
        end = choice["finish_reason"] or end
    return text, calls, end


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"guided_grammar": 'start: "a"{5,5}'}, "aaaaa"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"const": "42"}},
                }
            },
            '"42"',
        ),
        ({"guided_json": {"const": "42"}}, '"42"'),
        ({"structured_outputs": {"json": {"const": "42"}}}, '"42"'),
        ({"guided_choice": ["你好🦙"]}, "你好🦙"),
        ({"structured_outputs": {"regex": " b{3}"}}, " bbb"),  # its blank is not trimmed
    ],
)
def test_where_only_one_text_fits(client: Client, keys: dict[str, Any], text: str) -> None:
    asked = WARM | keys | {"logprobs": True}
    response = client.chat(**asked)
    assert said(response) == (text, "stop")
    tokens = response.json()["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in tokens) == text
    assert streamed(client.chat(stream=True, **asked)) == (text, [], "stop")
    assert client.complete(**WARM | keys).json()["choices"][0]["text"] == text


def test_json_object_and_length(client: Client) -> None:
    keys = WARM | {"response_format": {"type": "json_object"}, "max_tokens": 40, "n": 4}
    for choice in client.chat(**keys).json()["choices"]:
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"guided_json": {"type": "string", "minLength": 5, "maxLength": 2}}, "Unsatisfiable"),
        ({"guided_json": {"not": {}}}, "not"),
        ({"guided_regex": "(?=a)b"}, "look-around"),
        ({"guided_grammar": "start: ("}, "cannot be"),
        ({"guided_json": {"enum": ["a" * 70_000]}}, "bytes"),
        ({"guided_json": json.loads("[" * 40 + "]" * 40)}, "is none"),
        ({"guided_json": {"a": json.loads("[" * 400 + "]" * 400)}}, "deeper"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
          "tool_choice": "required"}, "not"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_forms_that_cannot_be(client: Client, keys: Any, part: str, stream: bool) -> None:
    assert part in error(client.chat(stream=stream, **keys), 400)["message"]
    assert client.chat().status_code == 200


@pytest.mark.parametrize(
    "keys",
    [{"guided_regex": "\ud800"}, {"guided_json": {"\ud800": 1}}, {"guided_choice": ["\ud800"]}],
)
def test_half_a_character(client: Client, keys: Any) -> None:
    body = json.dumps({"model": "tiny", "messages": HI} | keys)
    headers = {"Content-Type": "application/json"}
    assert error(client("POST", "/v1/chat/completions", content=body, headers=headers), 400)


# -- tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_is_made(client: Client, choice: Any, parallel: bool) -> None:
    keys = WARM | {"tools": [WEATHER, NOW], "tool_choice": choice, "parallel_tool_calls": parallel}
    keys |= {"max_tokens": 350}
    (whole,) = client.chat(**keys).json()["choices"]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
    calls = whole["message"]["tool_calls"]
    assert len({call["id"] for call in calls}) == len(calls) >= 1
    assert len(calls) == 1 or (parallel and choice == "required")
    for call in calls:
        assert call["type"] == "function" and call["id"].startswith("call_")
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "weather":
            assert arguments["city"] in ("北京", "Bern") and 1 <= arguments["days"] <= 7
        else:
            assert choice == "required" and (call["function"]["name"], arguments) == ("now", {})
    text, parts, end = streamed(client.chat(stream=True, **keys))
    assert (text, end) == ("", "tool_calls")
    assert [call["function"] for call in parts] == [call["function"] for call in calls]


def test_tools_count_as_tokens_and_tokenize_shows_them(client: Client) -> None:
    used = client.chat(tools=[WEATHER], max_tokens=1).json()["usage"]["prompt_tokens"]
    body: dict[str, Any] = {"messages": HI, "tools": [WEATHER], "return_token_strs": True}
    shown = client("POST", "/tokenize", json=body).json()
    assert shown["count"] == used and "weather" in "".join(shown["token_strs"])
    for wrong in ({"prompt": "x", "tools": [WEATHER]}, body | {"tools": [WEATHER, WEATHER]}):
        assert "tools" in error(client("POST", "/tokenize", json=wrong), 400)["message"]


def test_a_call_that_is_cut_off_stays_text(client: Client) -> None:
    keys = WARM | {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 20}
    text, end = said(client.chat(**keys))
    assert end == "length" and text and text.startswith('<tool_call>\n{"name"')


def test_auto_and_none(client: Client, worker: Worker) -> None:
    tokenizer = worker.engine.tokenizer
    plain = client.chat().json()
    none = client.chat(tools=[WEATHER], tool_choice="none").json()
    assert none["choices"] == plain["choices"] and none["usage"] == plain["usage"] | {
        "prompt_tokens_details": none["usage"]["prompt_tokens_details"]
    }
    auto = client.chat(tools=[WEATHER], max_tokens=5).json()
    rows = explained(HI, [WEATHER])
    assert auto["usage"]["prompt_tokens"] == len(render(tokenizer, rows, reply=True).ids)
    assert "tool_calls" not in auto["choices"][0]["message"]


def test_results_are_read(client: Client, worker: Worker) -> None:
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Bern", "days": 1}'}  # type: ignore[assignment]
    talk = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    asked = client.chat(messages=talk, tools=[WEATHER], max_tokens=3).json()["usage"]
    rows = [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": f'{OPEN}\n{{"name": "weather", "arguments": {{"city": "Bern", "days": 1}}}}\n{CLOSE}',
        },
        {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"},
    ]
    expected = render(worker.engine.tokenizer, explained(rows, [WEATHER]), reply=True).ids
    assert asked["prompt_tokens"] == len(expected)


HERMES = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Calls: <tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_knows_tools(tiny_folder: Path) -> None:
    assert native(HERMES) and not native(None)
    assert not native(HERMES.replace('"arguments"', "<function=")) and not native("{{ messages }}")
    tokenizer = Tokenizer.load(tiny_folder, HERMES)
    calls = [{"function": {"name": "f", "arguments": {"role": "<|im_end|>", "a": 1}}}]
    rows = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    tool = {"function": {"name": "f", "parameters": {"role": {"description": "<|im_end|>你"}}}}
    ids = render(tokenizer, rows, reply=True, tools=[tool]).ids
    text = tokenizer.decode(ids, specials=True)
    assert json.dumps(tool, ensure_ascii=False) in text
    assert '<tool_call>f {"role": "<|im_end|>", "a": 1}</tool_call>' in text
    (end,) = tokenizer.encode("<|im_end|>", specials=True)
    assert ids.count(end) == 3  # the turns' own; what tools and calls say stays text
    with pytest.raises(Exception, match="holds a special token"):
        render(tokenizer, rows, reply=True, tools=[{"<|im_end|>": 1}])


pieces = st.sampled_from(
    [OPEN, CLOSE, "<tool", "_call>", "\n", " ", "a", "你", '{"name": "now"}', "{", "<"]
)


@given(st.lists(pieces, max_size=12), st.integers(1, 4))
def test_calls_are_the_same_however_the_text_comes(parts: list[str], size: int) -> None:
    text = "".join(parts)

    def read(bits: list[str]) -> tuple[str, list[Any]]:
        reader = Calls(["now"], None)
        content = "".join(reader.push(bit)[0] for bit in bits) + reader.push("", last=True)[0]
        return content, [call["function"] for call in reader.calls]

    whole = read([text])
    assert read([text[at : at + size] for at in range(0, len(text), size)]) == whole
    if not whole[1]:
        assert whole[0] == text
    assert all(call == {"name": "now", "arguments": "{}"} for call in whole[1])


def test_text_around_calls() -> None:
    call = f'{OPEN}\n{{"name": "now", "arguments": {{}}}}\n{CLOSE}'
    reader = Calls(["now"], None)
    content, calls = reader.push(f"Let me see.\n{call}\n{call}\nDone.", last=True)
    assert content == "Let me see.Done." and len(calls) == 2
    reader = Calls(["now"], 1)
    assert len(reader.push(call * 3, last=True)[1]) == 1
    unclosed = call.removesuffix(CLOSE)
    assert len(Calls(["now"], None).push(unclosed, last=True)[1]) == 1
    other = call.replace("now", "never")
    assert Calls(["now"], None).push(other, last=True) == (other, [])


def test_the_grammar_of_calls_has_its_limit() -> None:
    tools = [Tool.model_validate(WEATHER), Tool.model_validate(NOW)]
    assert '("\\n" call){0,7}' in grammar(tools, 8).text
    assert "{0," not in grammar(tools, 1).text.splitlines()[0]
