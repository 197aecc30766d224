"""The real openai client against a real server process on a free loopback port."""

from __future__ import annotations

import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

import herdbook
from herdbook.book.book import Book
from herdbook.book.keys import Keys
from herdbook.model.fetch import Fetch
from tests.oracles.servers import Server, running

HI: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    yield from running(str(tiny_folder))


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def model(tiny_folder: Path) -> str:
    return tiny_folder.name


def test_models(client: openai.OpenAI, model: str):
    assert [card.id for card in client.models.list()] == [model]
    assert client.models.retrieve(model).owned_by == "herdbook"


def test_chat_streamed_and_not(client: openai.OpenAI, model: str):
    whole = client.chat.completions.create(model=model, messages=HI, max_completion_tokens=12)
    assert whole.usage and whole.usage.completion_tokens <= 12
    assert whole.usage.prompt_tokens_details
    text, end, usage = "", None, None
    with client.chat.completions.create(
        model=model,
        messages=HI,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                end = choice.finish_reason or end
    assert text == whole.choices[0].message.content
    assert end == whole.choices[0].finish_reason
    assert usage and usage.completion_tokens == whole.usage.completion_tokens


def test_embeddings(client: openai.OpenAI, model: str, tiny_folder: Path):
    """The client asks for base64 of its own accord, and unpacks it."""
    reply = client.embeddings.create(model=model, input=["hello", "the cat"])
    ours = herdbook.load(str(tiny_folder)).embed(["hello", "the cat"], normalise=True)
    for one, vector in zip(reply.data, ours.tolist(), strict=True):
        assert one.embedding == pytest.approx(vector, abs=1e-2)
    plain = client.embeddings.create(model=model, input="hello", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(reply.data[0].embedding, abs=1e-2)
    assert reply.usage.total_tokens > plain.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="its vectors have 64 numbers"):
        client.embeddings.create(model=model, input="hello", dimensions=8)


def test_the_clients_own_stream_helper(client: openai.OpenAI, model: str):
    """It accumulates the chunks by its own rules and checks the indices on the way."""
    keys: dict[str, Any] = {"n": 3, "temperature": 1.2, "seed": 4, "max_tokens": 8}
    whole = client.chat.completions.create(model=model, messages=HI, **keys)
    with client.chat.completions.stream(model=model, messages=HI, **keys) as stream:
        for _ in stream:
            pass
        final = stream.current_completion_snapshot
    for ours, theirs in zip(whole.choices, final.choices, strict=True):
        assert ours.index == theirs.index
        assert ours.message.content == theirs.message.content
        assert ours.finish_reason == theirs.finish_reason


def test_completions_streamed_and_not(client: openai.OpenAI, model: str):
    prompts = ["hello", "who are you"]
    whole = client.completions.create(model=model, prompt=prompts, max_tokens=8, echo=True)
    texts = ["", ""]
    for chunk in client.completions.create(
        model=model, prompt=prompts, max_tokens=8, echo=True, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))


def test_a_history_as_the_client_gives_it_back(client: openai.OpenAI, model: str):
    """`message.model_dump()` carries many nulls."""
    first = client.chat.completions.create(model=model, messages=HI, max_tokens=4)
    history: Any = [*HI, first.choices[0].message.model_dump(), *HI]
    assert client.chat.completions.create(model=model, messages=history, max_tokens=4).choices


def test_extensions_travel_in_extra_body(client: openai.OpenAI, model: str):
    keys: dict[str, Any] = {"model": model, "messages": HI, "max_tokens": 8}
    greedy = client.chat.completions.create(**keys)
    one = client.chat.completions.create(
        **keys, temperature=2.0, seed=1, extra_body={"top_k": 1, "min_p": 0.0}
    )
    assert one.choices[0].message.content == greedy.choices[0].message.content


def test_logprobs_add_up_in_the_clients_stream(client: openai.OpenAI, model: str):
    keys: dict[str, Any] = {"n": 2, "temperature": 1.2, "seed": 4, "max_tokens": 8}
    keys |= {"logprobs": True, "top_logprobs": 3, "logit_bias": {"5": -100}}
    whole = client.chat.completions.create(model=model, messages=HI, **keys)
    with client.chat.completions.stream(model=model, messages=HI, **keys) as stream:
        for _ in stream:
            pass
        final = stream.current_completion_snapshot
    for ours, theirs in zip(whole.choices, final.choices, strict=True):
        assert ours.logprobs and ours.logprobs.content and theirs.logprobs
        pairs = list(zip(ours.logprobs.content, theirs.logprobs.content or [], strict=True))
        for one, other in pairs:  # in bfloat16 a batch's other rows change the last digits
            assert (one.token, one.bytes) == (other.token, other.bytes)
            assert abs(one.logprob - other.logprob) <= 0.1
        assert "".join(one.token for one in ours.logprobs.content) == ours.message.content
        assert all(len(one.top_logprobs) == 3 for one in ours.logprobs.content)


class Answer(pydantic.BaseModel):
    yes: bool
    digit: Literal["1", "2"]


def test_the_client_parses_what_it_asked_for(client: openai.OpenAI, model: str):
    keys: dict[str, Any] = {"temperature": 1.2, "seed": 4, "max_tokens": 200}
    reply = client.chat.completions.parse(model=model, messages=HI, response_format=Answer, **keys)
    assert isinstance(reply.choices[0].message.parsed, Answer)


def test_the_clients_tools(smollm2_path: Path):
    """The real model calls, is told the result, and answers; whole and through the stream helper."""
    tool: Any = openai.pydantic_function_tool(Answer, name="answer", description="Answer yes or no")
    question: Any = [{"role": "user", "content": "Is water wet? Say yes with digit 1."}]
    for server in running(str(smollm2_path)):
        client, model = server.client(), smollm2_path.name.removesuffix(".gguf")
        keys: dict[str, Any] = {"model": model, "tools": [tool], "max_tokens": 80}
        first = client.chat.completions.parse(messages=question, tool_choice="required", **keys)
        (choice,) = first.choices
        assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
        assert isinstance(choice.message.tool_calls[0].function.parsed_arguments, Answer)
        with client.chat.completions.stream(
            messages=question, tool_choice="required", **keys
        ) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion().choices[0].message
        assert final.tool_calls
        ours, theirs = choice.message.tool_calls[0].function, final.tool_calls[0].function
        assert (ours.name, ours.arguments) == (theirs.name, theirs.arguments)
        dumped = choice.message.model_dump(exclude={"parsed"}, exclude_none=True)
        for call in dumped["tool_calls"]:
            call["function"].pop("parsed_arguments", None)
        result = {"role": "tool", "tool_call_id": dumped["tool_calls"][0]["id"], "content": "yes"}
        results = [result | {"tool_call_id": call["id"]} for call in dumped["tool_calls"]]
        talk: Any = [*question, dumped, *results]
        last = client.chat.completions.create(messages=talk, model=model, max_tokens=8)
        assert last.choices[0].message.content
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "42"}}}
        last = client.chat.completions.create(messages=question, model=model, response_format=form)
        assert last.choices[0].message.content == '"42"'


def test_errors_are_the_clients_own(client: openai.OpenAI, model: str):
    with pytest.raises(openai.NotFoundError, match="not served here") as missing:
        client.chat.completions.create(model="nope", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="is not known") as bad:
        wrong: Any = [{"role": "king", "content": "hello"}]
        client.chat.completions.create(model=model, messages=wrong)
    assert bad.value.param == "messages[0].role"
    with pytest.raises(openai.BadRequestError, match="600 tokens") as long:
        client.completions.create(model=model, prompt=[5] * 600, stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="less than or equal to 20"):
        client.chat.completions.create(model=model, messages=HI, logprobs=True, top_logprobs=21)


def test_a_client_that_leaves_is_forgotten(server: Server, client: openai.OpenAI, model: str):
    stream = client.completions.create(model=model, prompt=[5, 6], max_tokens=500, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(200):
        if server.health()["models"][model]["open_requests"] == 0:
            return
        time.sleep(0.01)
    raise AssertionError(f"still open: {server.health()}")


def test_key_and_ctrl_c(tiny_folder: Path):
    for server in running(str(tiny_folder), key="s3cret"):
        with pytest.raises(openai.AuthenticationError, match="a wrong API key"):
            server.client("nope").models.list()
        assert server.client("s3cret").models.list().data
        assert server.health()["status"] == "ok"
        code, output = server.stop()
        assert code == 0, output
        assert "Traceback" not in output
        assert "Authorization: Bearer" in output and "s3cret" not in output


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_stopping_server_lets_replies_finish(tiny_folder: Path, model: str, signal_: int):
    for server in running(str(tiny_folder)):
        stream = server.client().completions.create(
            model=model, prompt=[5, 6], max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        server.process.send_signal(signal_)
        time.sleep(0.5)
        with pytest.raises((urllib.error.URLError, OSError)):  # nobody new comes in
            server.health()
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        code, output = server.end()
        assert code == 0 and "Traceback" not in output, output
        assert "in=2 out=400" in output and "outcome=ok" in output


def test_limits_and_revoked_keys_as_the_client_sees_them(
    tiny_folder: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HERDBOOK_HOME", str(tmp_path / "home"))
    keys = Keys(Book())
    key = keys.add("alice", requests_per_minute=1)
    for server in running(str(tiny_folder)):
        client = server.client(key)
        asked: dict[str, Any] = {"model": model, "messages": HI, "max_tokens": 3}
        assert client.chat.completions.create(**asked).choices
        with pytest.raises(openai.RateLimitError, match="at most 1 a minute") as limited:
            client.chat.completions.create(**asked)
        assert int(limited.value.response.headers["retry-after"]) >= 1
        keys.revoke("alice")
        time.sleep(2.5)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert "key=alice" in server.output and key not in server.output


def test_a_model_that_does_not_load(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    code, output = Server(str(tmp_path)).end()
    assert code != 0
    assert "FileError" in output and "config.json" in output


def test_the_real_model(smollm2_path: Path):
    """SmolLM2 says where Paris is, as chat and as a stream."""
    question: Any = [{"role": "user", "content": "Name the capital city of France."}]
    for server in running(str(smollm2_path)):
        client, model = server.client(), smollm2_path.name.removesuffix(".gguf")
        whole = client.chat.completions.create(model=model, messages=question, max_tokens=10)
        assert "Paris" in (whole.choices[0].message.content or "")
        stream = client.chat.completions.create(
            model=model, messages=question, max_tokens=10, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content


def test_a_model_of_the_book_is_served_by_its_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `herd serve NAME` does after a raise: the server asks the book of HERDBOOK_HOME."""
    monkeypatch.setenv("HERDBOOK_HOME", str(tmp_path / "home"))
    Fetch(ref=str(tiny_folder)).run(Book(), name="mine")
    for server in running("mine"):
        reply = server.client().chat.completions.create(model="mine", messages=HI, max_tokens=3)
        assert reply.usage and reply.usage.completion_tokens >= 1
