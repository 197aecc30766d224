"""What is obeyed, what is refused, what is ignored with a warning."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from herdbook.engine.request import Sampling
from herdbook.serving.problems import explain
from herdbook.serving.schema import UNSUPPORTED, ChatAsk, CompletionAsk

HI = [{"role": "user", "content": "Hi"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**keys: Any) -> ChatAsk:
    return ChatAsk.model_validate({"model": "m", "messages": HI} | keys)


def complete(**keys: Any) -> CompletionAsk:
    return CompletionAsk.model_validate({"model": "m", "prompt": "Hi"} | keys)


def refusal(make: Any, **keys: Any) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        make(**keys)
    return explain(caught.value.errors())


def test_a_bare_request_is_greedy():
    sampling = chat().sampling(max_tokens=7, choice=0)
    assert sampling == Sampling(max_tokens=7, seed=None)
    assert sampling.temperature == 0


def test_every_setting_reaches_the_engine():
    ask = chat(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=3,
        stop=["a", "b"],
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        repetition_penalty=1.1,
        logit_bias={"7": -100, "8": 1.5},
        min_tokens=2,
        stop_token_ids=[9],
        logprobs=True,
        top_logprobs=4,
        priority=-1,
    )
    assert ask.priority == -1 and not ask.warnings
    assert ask.sampling(max_tokens=5, choice=2) == Sampling(
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=5,  # 3 + choice 2
        stop=("a", "b"),
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        repetition_penalty=1.1,
        logit_bias={7: -100, 8: 1.5},  # type: ignore[arg-type]
        min_tokens=2,
        stop_token_ids=(9,),
        logprobs=4,
    )


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_any_64_bit_seed_is_taken(seed: int):
    assert 0 <= chat(seed=seed).sampling(max_tokens=1, choice=3).seed < 2**63  # type: ignore[operator]


def test_null_means_missing():
    keys = dict.fromkeys([*ChatAsk.model_fields, *UNSUPPORTED, "never heard of"])
    ask = ChatAsk.model_validate(keys | {"model": "m", "messages": HI})
    assert ask.sampling(max_tokens=3, choice=0) == chat().sampling(max_tokens=3, choice=0)
    assert ask.choices == 1 and ask.limit is None and ask.warnings == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Hi", "Hi"),
        ("", ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([], ""),
    ],
)
def test_content_as_text_or_parts(content: Any, text: str):
    assert chat(messages=[{"role": "user", "content": content}]).messages[0].content == text


def test_developer_is_system():
    assert chat(messages=[{"role": "developer", "content": "x"}]).messages[0].role == "system"


@pytest.mark.parametrize(
    ("messages", "param", "part"),
    [
        ("Hi", "messages", "valid list"),
        ([], "messages", "at least 1 item"),
        (["Hi"], "messages[0]", "valid dictionary"),
        ([{"content": "Hi"}], "messages[0].role", "is required"),
        ([{"role": "user"}], "messages[0].content", "is required"),
        ([{"role": "king", "content": "Hi"}], "messages[0].role", "'king' is not known"),
        ([*HI, {"role": "user", "content": 7}], "messages[1].content", "(received 7)"),
        ([{"role": "user", "content": None}], "messages[0].content", "string or a list"),
        ([{"role": 1, "content": "Hi"}], "messages[0].role", "valid string"),
        ([{"role": "function", "content": "Hi"}], "messages[0].role", "use 'tool'"),
        ([{"role": "tool", "content": "Hi"}], "messages[0]", "'tool_call_id' belongs to"),
        ([{"role": "user", "content": "Hi", "tool_call_id": "x"}], "messages[0]", "belongs to"),
        (
            [{"role": "user", "content": "Hi", "tool_calls": [CALL]}],
            "messages[0]",
            "the assistant's",
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [CALL | {"function": {"name": "f", "arguments": "1"}}],
                }
            ],
            "messages[0].tool_calls[0].function",
            "the text of a JSON object",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content",
            "'image_url' is not supported",
        ),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{}]}],
            "messages[0].tool_calls[0].id",
            "is required",
        ),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content", "half a character"),
    ],
)
def test_malformed_messages(messages: Any, param: str, part: str):
    message, about = refusal(chat, messages=messages)
    assert about == param and part in message and param in message


@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"1": 101.0}}, "logit_bias.1"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_wrong_values_name_their_key(keys: dict[str, Any], param: str):
    message, about = refusal(chat, **keys)
    assert about == param and f"{param!r}: " in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("suffix", "x"),
    ],
)
def test_what_would_change_the_reply_is_refused(key: str, value: Any):
    for make in (chat, complete):
        message, _ = refusal(make, **{key: value})
        assert message == f"{key!r} is not supported yet; leave it out"


def test_best_of_is_for_completions():
    assert "not supported" in refusal(chat, best_of=2)[0]
    ask = complete(best_of=4, n=2)
    assert (ask.draws, ask.choices) == (4, 2)
    assert ask.sampling(max_tokens=1, choice=3).logprobs == 0  # the engine must tell which is best
    assert "less than 'n' = 3" in refusal(complete, best_of=2, n=3)[0]
    assert "cannot be streamed" in refusal(complete, best_of=2, stream=True)[0]
    assert complete(best_of=2, n=2, stream=True).stream
    assert "2 prompts × best_of = 9" in refusal(complete, prompt=["a", "b"], best_of=9)[0]


def test_who_is_told_of_prompts():
    ask = complete(echo=True, logprobs=3, n=2)
    assert [ask.sampling(max_tokens=1, choice=at).prompt_logprobs for at in (0, 1)] == [3, None]
    ask = complete(echo=True, logprobs=3, prompt_logprobs=5)
    assert ask.sampling(max_tokens=1, choice=0).prompt_logprobs == 5
    assert complete(echo=True).sampling(max_tokens=1, choice=0).prompt_logprobs is None
    assert chat(prompt_logprobs=0).sampling(max_tokens=1, choice=0).prompt_logprobs == 0
    assert "leave out 'stream'" in refusal(chat, prompt_logprobs=0, stream=True)[0]


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"tools": [{"type": "function"}]}, "'tools[0].function' is required"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "'tools[0].function.name'",
        ),
        ({"tools": [TOOL, TOOL]}, "two functions of the same name"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "'tool_choice': must be"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "'tool_choice': must be"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "names 'g'",
        ),
        ({"tool_choice": "required"}, "there are no 'tools'"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "cannot be had together"),
        ({"tools": [TOOL], "tool_choice": "required", "min_tokens": 2}, "'min_tokens' cannot be"),
        ({"response_format": {"type": "xml"}}, "'response_format.type'"),
        ({"response_format": {"type": "json_schema"}}, 'needs "json_schema"'),
        ({"guided_json": 7}, "a JSON schema is an object"),
        ({"guided_regex": "a" * 5000}, "5000 bytes"),
        ({"guided_choice": []}, "'guided_choice'"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex and guided_choice"),
        ({"structured_outputs": {"xml": "a"}}, "'structured_outputs.xml'"),
        ({"guided_regex": "a", "min_tokens": 1}, "'min_tokens' cannot be"),
    ],
)
def test_forms_and_tools_that_cannot_be(keys: dict[str, Any], part: str):
    assert part in refusal(chat, **keys)[0]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, "json"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "json"),
        ({"guided_json": '{"type": "object"}'}, "json"),
        ({"guided_regex": "a"}, "regex"),
        ({"guided_grammar": 'start: "a"'}, "lark"),
        ({"guided_choice": ["a", "b"]}, "lark"),
        ({"structured_outputs": {"json": {}}}, "json"),
        ({"structured_outputs": {"json_object": True}}, "json"),
        ({"structured_outputs": {"regex": "a"}}, "regex"),
        ({"structured_outputs": {"choice": ["a"]}}, "lark"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "lark"),
    ],
)
def test_forms_become_a_grammar(keys: dict[str, Any], kind: str | None):
    for make in (chat, complete):
        grammar = make(**keys).sampling(max_tokens=1, choice=0).grammar
        assert (grammar and grammar.kind) == kind


def test_what_asks_for_nothing_is_tolerated():
    idle = {key: values[0] for key, values in UNSUPPORTED.items() if values}
    assert chat(**idle, user="me", metadata={}).warnings == []


def test_unknown_keys_are_told():
    assert chat(temprature=1.0).warnings == [
        "ignored unknown key 'temprature'; did you mean 'temperature'?"
    ]
    assert chat(zzz=1).warnings == ["ignored unknown key 'zzz'; it had no effect"]


def test_stream_options_need_a_stream():
    message, _ = refusal(chat, stream_options={"include_usage": True})
    assert "'stream_options' is only allowed together with" in message
    assert chat(stream=True, stream_options={"include_usage": True}).stream_options


def test_two_limits_must_agree():
    assert chat(max_tokens=3).limit == chat(max_completion_tokens=3).limit == 3
    assert chat().limit is None and complete().limit == 16
    assert "name one of them" in refusal(chat, max_tokens=3, max_completion_tokens=4)[0]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts_in_four_shapes(prompt: Any, prompts: Any):
    assert complete(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [7, [], ["a", 1], [1, [2]], [[]], [["a"]], {}, [True]])
def test_malformed_prompts(prompt: Any):
    assert refusal(complete, prompt=prompt)[1] == "prompt"


def test_too_many_choices():
    assert complete(prompt=["a"] * 4, n=4).choices == 4
    assert "4 prompts × n = 5" in refusal(complete, prompt=["a"] * 4, n=5)[0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
keys = st.sampled_from([*ChatAsk.model_fields, *CompletionAsk.model_fields, *UNSUPPORTED, "x"])


@given(st.dictionaries(keys, json_values) | json_values)
def test_whatever_comes_is_either_taken_or_explained(body: Any):
    for shape in (ChatAsk, CompletionAsk):
        try:
            ask = shape.model_validate(body)
        except ValidationError as error:
            message, _ = explain(error.errors())
            assert message
        else:
            ask.sampling(max_tokens=max(1, ask.min_tokens or 0), choice=0)
