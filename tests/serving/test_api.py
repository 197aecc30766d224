"""The API over a real engine: shapes, streams, limits, errors."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from herdbook.engine.request import Sampling
from herdbook.serving.api import app
from herdbook.serving.chat import Talk
from herdbook.serving.guard import MAX_BODY_BYTES
from herdbook.serving.setup import Setup
from herdbook.serving.worker import Worker
from herdbook.tokens.chat import render

from .conftest import Client, chunks

HI = [{"role": "user", "content": "hello"}]


def error(response: Any, status: int) -> dict[str, Any]:
    """The error body; asserts OpenAI's shape and the status."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    return body["error"]


# -- replies ------------------------------------------------------------------------------------


def test_a_templates_text_ends_chats_but_no_completions(
    tiny_folder: Path, stopping: tuple[Path, str, str]
):
    file, whole, left = stopping
    worker = Worker(
        "tiny", partial(Setup([], template=str(file)).engine, str(tiny_folder), None, {})
    )
    worker.start()
    try:
        client = Client(app({"tiny": worker.wait(60)}))
        (choice,) = client.chat("你好", max_tokens=24).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (left, "stop")
        talk = [{"role": "user", "content": "你好"}]
        ids = render(worker.engine.tokenizer, talk, reply=True).ids
        assert client.complete(ids, max_tokens=24).json()["choices"][0]["text"] == whole
    finally:
        worker.stop(grace_s=0)


def test_chat_reply(client: Client, worker: Worker):
    body = client.chat().json()
    assert body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["id"].startswith("chatcmpl-") and isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] in ("stop", "length")
    assert choice["message"]["role"] == "assistant"
    ids = render(worker.engine.tokenizer, HI, reply=True).ids
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert 1 <= usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_chat_sees_what_training_sees(client: Client, worker: Worker):
    """The chat route's reply equals a completion of the ids that `render` gives."""
    ids = render(worker.engine.tokenizer, HI, reply=True).ids
    plain = client.complete(ids).json()
    chat = client.chat().json()
    assert chat["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    assert chat["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]


def test_who_is_served_is_told_todays_date(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "dated.jinja"
    file.write_text("{{ strftime_now('%Y') }} {{ messages[0].content }}", encoding="utf-8")
    dated = Worker(
        "tiny", partial(Setup([], template=str(file)).engine, str(tiny_folder), None, {})
    )
    dated.start()
    asked: list[str] = []
    try:
        engine = dated.wait(60).engine
        take = dated._take

        def noted(requests: Any, put: Any) -> Any:
            asked.extend(engine.tokenizer.decode(request.ids) for request in requests)
            return take(requests, put)

        monkeypatch.setattr(dated, "_take", noted)
        Client(app({"tiny": dated})).chat("hello", max_tokens=1)
        list(Talk(dated, None, Sampling(max_tokens=1)).say("hello"))
    finally:
        dated.stop(grace_s=0)
    assert asked == [f"{datetime.now():%Y} hello"] * 2


def test_content_parts_are_the_same_text(client: Client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    found = client.chat(messages=[{"role": "user", "content": parts}]).json()
    assert found["choices"] == client.chat().json()["choices"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5, "top_k": 50}])
def test_a_stream_is_the_whole_reply_in_parts(client: Client, settings: dict[str, Any]):
    whole = client.chat(**settings).json()
    parts = chunks(client.chat(stream=True, **settings))
    assert len({part["id"] for part in parts}) == 1
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert len({(part["created"], part["model"]) for part in parts}) == 1
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["choices"][0]["message"]["content"]
    ends = [part["choices"][0]["finish_reason"] for part in parts]
    assert ends[:-1] == [None] * (len(ends) - 1)
    assert ends[-1] == whole["choices"][0]["finish_reason"]
    assert all("usage" not in part for part in parts)


def test_include_usage_is_a_last_chunk(client: Client):
    whole = client.chat().json()
    *parts, last = chunks(client.chat(stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == []
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][key] == whole["usage"][key]
    assert all(part["usage"] is None for part in parts)


def test_continuous_usage_grows(client: Client):
    options = {"continuous_usage_stats": True}
    counts = [
        part["usage"]["completion_tokens"]
        for part in chunks(client.chat(stream=True, stream_options=options))
    ]
    assert (
        counts == sorted(counts)
        and counts[-1] == client.chat().json()["usage"]["completion_tokens"]
    )


def test_n_choices_streamed_have_their_own_index(client: Client):
    keys = {"n": 3, "temperature": 1.5, "seed": 11}
    whole = client.chat(**keys).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    texts, ends, roles = ["", "", ""], [[], [], []], [0, 0, 0]
    for part in chunks(client.chat(stream=True, **keys)):
        (choice,) = part["choices"]
        at = choice["index"]
        texts[at] += choice["delta"].get("content", "")
        roles[at] += "role" in choice["delta"]
        if choice["finish_reason"]:
            ends[at].append(choice["finish_reason"])
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert ends == [[choice["finish_reason"]] for choice in whole["choices"]]
    assert roles == [1, 1, 1]
    assert len(set(texts)) == 3  # other seeds, other draws
    # Choice i is what seed + i alone gives.
    alone = client.chat(temperature=1.5, seed=12).json()
    assert alone["choices"][0]["message"]["content"] == texts[1]


def test_n_choices_compute_their_prompt_once(client: Client, worker: Worker):
    before = worker.engine.stats()
    prompt = [7 + at % 300 for at in range(160)]
    usage = client.complete(prompt, n=4, max_tokens=2).json()["usage"]
    after = worker.engine.stats()
    assert usage["prompt_tokens"] == 160 and usage["prompt_tokens_details"]["cached_tokens"] == 0
    computed = sum(after[key] - before[key] for key in ("prefill_tokens", "decode_tokens"))
    assert computed < 2 * 160


def test_seeds(client: Client):
    def text(**keys: Any) -> str:
        body = client.chat(temperature=1.5, **keys).json()
        return body["choices"][0]["message"]["content"]

    assert text(seed=1) == text(seed=1)
    assert len({text(seed=1), text(seed=2), text(seed=3)}) > 1
    assert len({text() for _ in range(3)}) > 1  # no seed: another draw each time


def test_stop_strings_never_leak(client: Client):
    whole = client.chat().json()["choices"][0]["message"]["content"]
    assert len(whole) > 6, "the tiny model says too little for this test"
    stop = whole[3:5]
    expected = whole[: whole.index(stop)]
    for keys in ({"stop": stop}, {"stop": ["\x00never", stop]}):
        (choice,) = client.chat(**keys).json()["choices"]
        assert choice["message"]["content"] == expected and choice["finish_reason"] == "stop"
        parts = chunks(client.chat(stream=True, **keys))
        text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
        assert text == expected


# -- completions ----------------------------------------------------------------------------------


def test_prompts_in_four_shapes(client: Client, worker: Worker):
    tokenizer = worker.engine.tokenizer
    assert tokenizer is not None
    texts = ["hello", "who are you"]
    ids = [tokenizer.encode(text) for text in texts]
    alone = [client.complete(text).json()["choices"][0]["text"] for text in texts]
    for prompt in (texts, ids):
        body = client.complete(prompt).json()
        assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
        assert [choice["text"] for choice in body["choices"]] == alone
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert client.complete(ids[0]).json()["choices"][0]["text"] == alone[0]


def test_echo(client: Client, worker: Worker):
    plain = client.complete("hello").json()["choices"][0]["text"]
    assert client.complete("hello", echo=True).json()["choices"][0]["text"] == "hello" + plain
    tokenizer = worker.engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("hello")
    assert client.complete(ids, echo=True).json()["choices"][0]["text"] == "hello" + plain
    parts = chunks(client.complete("hello", echo=True, stream=True))
    assert "".join(part["choices"][0]["text"] for part in parts) == "hello" + plain


def test_echo_of_several_choices(client: Client):
    texts = [
        choice["text"]
        for choice in client.complete(["hello", "who"], n=2, echo=True).json()["choices"]
    ]
    assert [text[:3] for text in texts] == ["hel", "hel", "who", "who"]


def test_completions_are_16_tokens_unless_told(client: Client):
    body = client("POST", "/v1/completions", json={"model": "tiny", "prompt": "hello"}).json()
    assert body["usage"]["completion_tokens"] <= 16
    if body["choices"][0]["finish_reason"] == "length":
        assert body["usage"]["completion_tokens"] == 16


# -- what else there is ---------------------------------------------------------------------------


def test_models(client: Client):
    (card,) = client("GET", "/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["object"] == "model" and card["context_length"] == 512
    assert client("GET", "/v1/models/tiny").json() == card
    assert error(client("GET", "/v1/models/nope"), 404)["code"] == "model_not_found"


def test_health(client: Client):
    response = client("GET", "/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "models": {"tiny": {"status": "ready", "open_requests": 0}},
    }


def test_page(client: Client):
    response = client("GET", "/")
    assert response.headers["content-type"].startswith("text/html")
    assert "http://" not in response.text and "https://" not in response.text  # self-contained


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"[]", b"null", b"\xff\xfe", b'{"model": "tiny"', b"[" * 100_000, b"1" * 5000],
)
def test_malformed_json(client: Client, body: bytes):
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions"):
        found = error(client("POST", path, content=body, headers=headers), 400)
        assert found["type"] == "invalid_request_error" and "JSON" in found["message"]
    assert client.chat().status_code == 200  # and the server lives on


def test_json_errors_say_where(client: Client):
    headers = {"Content-Type": "application/json"}
    body = b'{"model": "tiny", }'
    found = error(client("POST", "/v1/chat/completions", content=body, headers=headers), 400)
    assert found["message"].startswith("the body is not valid JSON: ")
    assert found["message"].endswith("(at character 16)") or "at character" in found["message"]


def test_content_type_must_be_json(client: Client):
    """A form or text/plain can be sent by any web page without asking; JSON cannot."""
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}'
    headers = {"Content-Type": "text/plain"}
    found = error(client("POST", "/v1/chat/completions", content=body, headers=headers), 400)
    assert "Content-Type: application/json" in found["message"]


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        [],
        ["hello"],
        [{"content": "hello"}],
        [{"role": "user"}],
        [{"role": "king", "content": "hello"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        {"role": "user", "content": "hello"},
        None,
    ],
)
def test_malformed_messages(client: Client, messages: Any):
    for stream in (False, True):
        found = error(client.chat(messages=messages, stream=stream), 400)
        assert found["type"] == "invalid_request_error"
        assert found["param"].startswith("messages")
    assert client.chat().status_code == 200


def test_missing_messages(client: Client):
    found = error(client("POST", "/v1/chat/completions", json={"model": "tiny"}), 400)
    assert found == {
        "message": "'messages' is required",
        "type": "invalid_request_error",
        "param": "messages",
        "code": None,
    }


def test_unknown_model(client: Client):
    found = error(client.chat(model="nope"), 404)
    assert found["code"] == "model_not_found" and found["param"] == "model"
    assert found["message"] == "the model 'nope' is not served here; served are: 'tiny'"


def test_unknown_path_and_method(client: Client):
    assert "POST /v1/chat/completions" in error(client("GET", "/v2"), 404)["message"]
    response = client("GET", "/v1/chat/completions")
    assert error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_a_prompt_longer_than_the_context(client: Client):
    for stream in (False, True):
        found = error(client.complete([5] * 600, stream=stream), 400)
        assert found["code"] == "context_length_exceeded" and found["param"] == "prompt"
        assert "600 tokens" in found["message"] and "512 tokens" in found["message"]
    found = error(client.chat("你好" * 600), 400)
    assert found["code"] == "context_length_exceeded" and found["param"] == "messages"


def test_a_reply_longer_than_the_room_left(client: Client):
    found = error(client.complete([5] * 500, max_tokens=13), 400)
    assert found["message"] == (
        "500 tokens of prompt and 13 of reply do not fit the context of 512 tokens; "
        "ask for at most 12 tokens of reply"
    )
    assert client.complete([5] * 500, max_tokens=12).status_code == 200


def test_token_ids_outside_the_vocabulary(client: Client):
    for ids in ([1, 384], [-1], [2**70]):
        found = error(client.complete(ids, echo=True), 400)
        assert str(ids[-1]) in found["message"] and "vocabulary" in found["message"]


def test_an_empty_prompt(client: Client):
    assert "empty prompt" in error(client.complete(""), 400)["message"]


def test_unsupported_and_unknown_keys(client: Client):
    assert "'suffix' is not supported yet" in error(client.chat(suffix="x"), 400)["message"]
    assert "'functions'" in error(client.chat(functions=[{"name": "f"}]), 400)["message"]
    response = client.chat(temprature=1, stream=True)
    assert response.status_code == 200
    assert "did you mean 'temperature'?" in response.headers["x-herdbook-warning"]
    response = client.chat(**{"\u00fcnknown\n": 1})
    assert response.headers["x-herdbook-warning"].isascii()


def test_stream_options_without_stream(client: Client):
    found = error(client.chat(stream_options={"include_usage": True}), 400)
    assert "'stream_options'" in found["message"]


def test_a_large_body(client: Client):
    found = error(client.chat("x" * MAX_BODY_BYTES), 413)
    assert str(MAX_BODY_BYTES) in found["message"]

    async def drops():
        for _ in range(MAX_BODY_BYTES // 2**16 + 1):
            yield b"x" * 2**16

    headers = {"Content-Type": "application/json"}  # chunked: no length is announced
    response = client("POST", "/v1/chat/completions", content=drops(), headers=headers)
    assert str(MAX_BODY_BYTES) in error(response, 413)["message"]
    assert client.chat().status_code == 200


def test_the_key(worker: Worker):
    client = Client(app({"tiny": worker}, key="s3cret"))
    for headers in ({}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic s3cret"}):
        response = client("GET", "/v1/models", headers=headers)
        assert error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    right = {"Authorization": "Bearer s3cret"}
    assert client("GET", "/v1/models", headers=right).status_code == 200
    assert client("GET", "/health").status_code == 200
    away = {**right, "Host": "herd.example.org"}
    assert client("GET", "/v1/models", headers=away).status_code == 200


def test_without_a_key_only_this_machines_names(client: Client):
    """DNS rebinding: evil.example resolves to 127.0.0.1, and its page calls us."""
    response = client("GET", "/v1/models", headers={"Host": "evil.example"})
    assert error(response, 403)["code"] == "wrong_host"
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client("GET", "/v1/models", headers={"Host": host}).status_code == 200
