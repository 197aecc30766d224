"""What replies tell of their tokens, and what steers them: logprobs, echo, n, best_of, seeds, stops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from herdbook.engine.request import Logprob, Piece
from herdbook.serving.logprobs import Listing, Token, chat
from herdbook.serving.worker import Worker
from herdbook.tokens.chat import render

from .conftest import Client, chunks
from .test_api import HI, error

WARM = {"temperature": 1.4, "seed": 3}


def joined(told: list[dict[str, Any]]) -> str:
    """Of a chat's logprobs: its tokens' bytes, joined."""
    return bytes(byte for one in told for byte in one["bytes"] or ()).decode("utf-8", "replace")


@pytest.mark.parametrize("top", [None, 0, 5, 20])
@pytest.mark.parametrize("settings", [{}, WARM, WARM | {"stop": ["o", "r"]}, {"max_tokens": 1}])
def test_chat_logprobs(client: Client, settings: dict[str, Any], top: int | None) -> None:
    asked = {"logprobs": True, "top_logprobs": top} | settings
    (choice,) = client.chat(**asked).json()["choices"]
    told = choice["logprobs"]["content"]
    text = choice["message"]["content"]
    assert "".join(one["token"] for one in told) == text
    if "\ufffd" not in text:
        assert joined(told) == text
    assert all(len(one["top_logprobs"]) == (top or 0) for one in told)
    assert all(one["logprob"] <= 0 for one in told)
    if not settings and top:  # greedy takes the most probable
        assert all(one["logprob"] == one["top_logprobs"][0]["logprob"] for one in told)
    streamed: list[dict[str, Any]] = []
    said = ""
    for part in chunks(client.chat(stream=True, **asked)):
        (one,) = part["choices"]
        said += one["delta"].get("content", "")
        new = (one["logprobs"] or {"content": []})["content"]
        assert not new or "".join(token["token"] for token in streamed + new) in (said, text)
        streamed += new
    assert (said, streamed) == (text, told)


@pytest.mark.parametrize("top", [0, 5, 20])
def test_completion_logprobs(client: Client, top: int) -> None:
    asked = WARM | {"logprobs": top, "min_tokens": 6}
    (choice,) = client.complete("hello", **asked).json()["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert len({len(row) for row in told.values()}) == 1
    starts = [len("".join(told["tokens"][:at])) for at in range(len(told["tokens"]))]
    assert told["text_offset"] == starts
    for logprob, best in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(best) in (top, top + 1) and logprob in best.values()
    streamed: dict[str, list[Any]] = {key: [] for key in told}
    for part in chunks(client.complete("hello", stream=True, **asked)):
        for key, row in (part["choices"][0]["logprobs"] or {}).items():
            streamed[key] += row
    assert streamed == told


@pytest.mark.parametrize(
    ("echo", "logprobs", "many", "n", "ids"),
    [*itertools.product([False, True], [None, 0, 3], [False, True], [1, 2], [False, True])],
)
def test_the_matrix(
    client: Client, worker: Worker, echo: bool, logprobs: Any, many: bool, n: int, ids: bool
) -> None:
    """echo × logprobs × list × n × text or ids, whole and streamed."""
    tokenizer = worker.engine.tokenizer
    assert tokenizer is not None
    texts = ["hello 你好", "who", "hello 你好"] if many else ["hello 你好"]
    prompt: Any = [tokenizer.encode(text) for text in texts] if ids else texts
    keys = WARM | {"echo": echo, "logprobs": logprobs, "n": n, "max_tokens": 5}
    prompt = prompt if many else prompt[0]
    choices = client.complete(prompt, **keys).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(texts) * n))
    for choice, text in zip(choices, [text for text in texts for _ in range(n)], strict=True):
        assert choice["text"].startswith(text) == echo
        told = choice["logprobs"]
        assert (told is None) == (logprobs is None)
        if told:
            assert "".join(told["tokens"]) == choice["text"]
            size = len(tokenizer.encode(text)) if echo else 0
            assert size < len(told["tokens"]) <= size + 5
            assert (told["token_logprobs"][0] is None) == echo == (told["top_logprobs"][0] is None)
            assert None not in told["token_logprobs"][1:]
            starts = [len("".join(told["tokens"][:at])) for at in range(len(told["tokens"]))]
            assert told["text_offset"] == starts
    texts_streamed = [""] * len(choices)
    tokens_streamed: list[list[str]] = [[] for _ in choices]
    for part in chunks(client.complete(prompt, stream=True, **keys)):
        (one,) = part["choices"]
        texts_streamed[one["index"]] += one["text"]
        tokens_streamed[one["index"]] += (one["logprobs"] or {"tokens": []})["tokens"]
    assert texts_streamed == [choice["text"] for choice in choices]
    if logprobs is not None:
        assert tokens_streamed == [choice["logprobs"]["tokens"] for choice in choices]


def test_prompt_logprobs(client: Client, worker: Worker) -> None:
    ids = render(worker.engine.tokenizer, HI, reply=True).ids
    of_chat = client.chat(prompt_logprobs=2).json()["prompt_logprobs"]
    (choice,) = client.complete(ids, prompt_logprobs=2).json()["choices"]
    assert of_chat == choice["prompt_logprobs"] and len(of_chat) == len(ids)
    assert of_chat[0] is None
    for id, known in zip(ids[1:], of_chat[1:], strict=True):
        assert len(known) in (2, 3) and known[str(id)]["rank"] >= 1
        assert {1, 2} <= {one["rank"] for one in known.values()}
    echoed = client.complete(ids, echo=True, logprobs=1).json()["choices"][0]["logprobs"]
    told = [
        None,
        *(known[str(id)]["logprob"] for id, known in zip(ids[1:], of_chat[1:], strict=True)),
    ]
    assert echoed["token_logprobs"][: len(ids)] == told


@pytest.mark.parametrize("keys", [{"logprobs": 21}, {"prompt_logprobs": 21}, {"logprobs": -1}])
def test_too_many_logprobs(client: Client, keys: dict[str, int]) -> None:
    found = error(client.complete(**keys), 400)
    assert found["param"] == next(iter(keys)) and "than or equal to" in found["message"]


def test_too_many_logprobs_of_a_chat(client: Client) -> None:
    found = error(client.chat(logprobs=True, top_logprobs=21), 400)
    assert found["param"] == "top_logprobs" and "20" in found["message"]
    assert "'top_logprobs' needs" in error(client.chat(top_logprobs=2), 400)["message"]


def test_best_of_is_the_likeliest_of_its_draws(client: Client) -> None:
    def mean(told: dict[str, Any]) -> float:
        return sum(told["token_logprobs"]) / len(told["token_logprobs"])

    keys = WARM | {"logprobs": 0, "min_tokens": 12}  # none ends early: the end token is not listed
    draws = client.complete("hello", n=5, **keys).json()
    ranked = sorted(draws["choices"], key=lambda choice: -mean(choice["logprobs"]))
    best = client.complete("hello", n=2, best_of=5, **keys).json()
    assert [one["text"] for one in best["choices"]] == [one["text"] for one in ranked[:2]]
    assert [one["index"] for one in best["choices"]] == [0, 1]
    assert best["usage"] == draws["usage"] | {
        "prompt_tokens_details": best["usage"]["prompt_tokens_details"]
    }
    del keys["logprobs"]
    quiet = client.complete("hello", best_of=5, **keys).json()["choices"]
    assert [one["text"] for one in quiet] == [ranked[0]["text"]] and quiet[0]["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_ends_that_are_ignored_are_listed(client: Client, worker: Worker, stream: bool) -> None:
    end = max(worker.engine.intake.stop_ids)
    keys = {"logit_bias": {str(end): 100}, "ignore_eos": True, "max_tokens": 5, "logprobs": True}
    answer = client.chat(stream=stream, **keys)
    bodies = chunks(answer) if stream else [answer.json()]
    told = [one["choices"][0]["logprobs"] for one in bodies]
    listed = [token for one in told for token in (one or {"content": []})["content"]]
    assert [(one["token"], one["bytes"]) for one in listed] == [("", None)] * 5


def test_alternatives_that_are_no_text_have_a_name(client: Client, worker: Worker) -> None:
    tokenizer = worker.engine.tokenizer
    assert tokenizer is not None and tokenizer.size < worker.engine.intake.vocab
    last = [(worker.engine.intake.vocab - 1, -0.5)]  # a row of the head without a token
    told = chat([Token("a", 0, Logprob(5, -1.0, 2, tuple(last)), b"a")], 1, tokenizer)
    assert told["content"][0]["top_logprobs"][0]["token"] == f"token_id:{last[0][0]}"
    seen = client.chat(logprobs=True, top_logprobs=20).json()["choices"][0]["logprobs"]["content"]
    assert all(other["token"] for one in seen for other in one["top_logprobs"])


def test_a_seed_gives_the_same_in_every_way(client: Client) -> None:
    def text(response: Any) -> list[str]:
        return [one["message"]["content"] for one in response.json()["choices"]]

    three = text(client.chat(n=3, **WARM))
    for at in range(3):
        assert text(client.chat(**WARM | {"seed": 3 + at})) == [three[at]]
    streamed = ["", "", ""]
    for part in chunks(client.chat(n=3, stream=True, **WARM)):
        (one,) = part["choices"]
        streamed[one["index"]] += one["delta"].get("content", "")
    assert streamed == three
    assert text(client.chat(n=8, **WARM))[:3] == three
    assert text(client.chat(n=3, logprobs=True, **WARM)) == three


def test_bias_stops_and_min_tokens(client: Client, worker: Worker) -> None:
    tokenizer = worker.engine.tokenizer
    assert tokenizer is not None
    (id,) = tokenizer.encode("h")
    (choice,) = client.complete(logit_bias={str(id): 100}, max_tokens=4).json()["choices"]
    assert choice["text"] == "hhhh"
    for keys in ({"stop_token_ids": [id]}, {"stop": ["zz", "h"]}):
        (choice,) = client.complete(logit_bias={str(id): 100}, logprobs=0, **keys).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", "stop")
        assert choice["logprobs"]["tokens"] == []
    keys = {"logit_bias": {str(id): 100}, "stop": ["hh"], "min_tokens": 3, "logprobs": 0}
    (choice,) = client.complete(**keys).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hhh", "stop")
    assert choice["logprobs"]["tokens"] == ["h"] * 3
    assert "token id 384" in error(client.complete(logit_bias={"384": 1}), 400)["message"]
    assert "token id 384" in error(client.chat(stop_token_ids=[384]), 400)["message"]
    assert "min_tokens" in error(client.complete(min_tokens=13), 400)["message"]


def test_a_character_of_several_tokens_and_a_stop_inside_one(worker: Worker) -> None:
    """The listing by itself: what has no text yet waits; what a stop cuts is cut."""
    tokenizer = worker.engine.tokenizer
    assert tokenizer is not None
    ids = [id for byte in "a🦙b".encode() for id in [tokenizer.codec.within(bytes([byte]))[0]]]
    assert len(ids) == 6

    def piece(text: str, at: int, finish: Any = None) -> Piece:
        return Piece("x", text, (ids[at],), finish, logprobs=(Logprob(ids[at], -1.0, 1),))

    listing = Listing(tokenizer)
    assert [one.text for one in listing.took(piece("a", 0))] == ["a"]
    for at in (1, 2, 3):
        assert listing.took(piece("", at)) == []
    assert [one.text for one in listing.took(piece("🦙", 4))] == ["", "", "", "🦙"]
    assert [one.text for one in listing.took(piece("", 5, "stop"))] == []  # b began a stop string
    listing = Listing(tokenizer)
    listing.took(piece("a", 0))
    listing.took(piece("", 1))
    cut = listing.took(piece("\ufffd", 2, "length"))
    assert [(one.text, one.data) for one in cut] == [("", b"\xf0"), ("\ufffd", b"\x9f")]


@pytest.mark.parametrize("n", [1, 2])
def test_a_prompt_is_scored_and_nothing_said(client: Client, worker: Worker, n: int) -> None:
    """max_tokens 0 with echo and logprobs: how lm-eval asks for likelihoods."""
    engine = worker.engine
    long = [at % 300 + 3 for at in range(engine.most_tokens)]  # leaves no room for a reply
    for ids in ([5, 6, 7, 8], [9], long, long):  # the last time out of the cache
        asked = {"echo": True, "logprobs": 2, "n": n, "temperature": 1.0}
        body = client.complete(ids, max_tokens=0, **asked).json()
        assert body["usage"]["completion_tokens"] == 0
        for choice in body["choices"]:
            told = choice["logprobs"]
            assert choice["finish_reason"] == "length"
            assert len(told["tokens"]) == len(ids) and "".join(told["tokens"]) == choice["text"]
            assert told["token_logprobs"][0] is None
            if ids[1:]:
                (score,) = engine.score(ids[:1], [ids[1:]])
                assert told["token_logprobs"][1:] == pytest.approx(score.logprobs, abs=0.03)
        if len(ids) < len(long):  # one token more says the same of the prompt
            more = client.complete(ids, max_tokens=1, **asked).json()["choices"][0]["logprobs"]
            assert {key: row[:-1] for key, row in more.items()} == told
        parts = chunks(client.complete(ids, max_tokens=0, stream=True, **asked))
        streamed = [part["choices"][0] for part in parts if part["choices"][0]["index"] == 0]
        assert "".join(part["text"] for part in streamed) == choice["text"]
        assert [part["logprobs"] for part in streamed if part["logprobs"]] == [told]
        assert streamed[-1]["finish_reason"] == "length"
    assert client.complete("hello", max_tokens=0, echo=True).json()["choices"][0]["text"] == "hello"
    assert "nothing would be told" in error(client.complete(max_tokens=0), 400)["message"]
    stats = engine.stats()
    assert not stats["running"] and not stats["pages_used"]
