"""Replies obey their grammar, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herdbook.engine.engine import Engine
from herdbook.engine.grammar import MOST_BYTES, MOST_DEPTH, Grammar, Grammars
from herdbook.engine.loading import load
from herdbook.engine.request import Reply, Request, Sampling
from herdbook.errors import RequestError

from .conftest import tiny


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return load(str(tiny_folder), dtype="float32").engine


def ask(engine: Engine, grammar: Grammar, **keys: Any) -> Reply:
    keys = {"max_tokens": 200, "temperature": 1.5, "seed": 0} | keys
    return engine.generate([Request([5, 6, 7], Sampling(grammar=grammar, **keys))])[0]


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar("lark", 'start: "a"{5,5}'), "aaaaa"),
        (Grammar("lark", 'root ::= "yes" "!"'), "yes!"),  # GBNF
        (Grammar.schema({"const": "42"}), '"42"'),
        (Grammar.choice(["你好，世界🦙"]), "你好，世界🦙"),
        (Grammar("regex", "[好]{3}"), "好好好"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_where_only_one_text_fits(
    engine: Engine, grammar: Grammar, text: str, temperature: float
) -> None:
    reply = ask(engine, grammar, temperature=temperature)
    assert (reply.text, reply.finish) == (text, "stop")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("pattern"), [r"[0-9]{4}-[0-9]{2}", "(你|好)[a-f]{2,4}!", r"(yes|no)( maybe){0,2}"]
)
def test_a_regex(engine: Engine, pattern: str, seed: int) -> None:
    reply = ask(engine, Grammar("regex", pattern), seed=seed)
    assert reply.finish == "stop" and re.fullmatch(pattern, reply.text)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "你"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_a_schema(engine: Engine, seed: int) -> None:
    reply = ask(engine, Grammar.schema(SCHEMA), seed=seed, max_tokens=400)
    assert reply.finish == "stop"
    found = json.loads(reply.text)
    assert set(found) == {"name", "age", "tags"}
    assert len(found["name"]) <= 5 and 0 <= found["age"] <= 99 and set(found["tags"]) <= {"a", "你"}


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choices=st.lists(texts, min_size=1, max_size=4), seed=st.integers(0, 9))
def test_a_choice_is_one_of_them(engine: Engine, choices: list[str], seed: int) -> None:
    reply = ask(engine, Grammar.choice(choices), seed=seed)
    assert reply.text in choices and reply.finish == "stop"


def test_no_end_before_the_grammar_allows_it(engine: Engine) -> None:
    """The model is pushed to its end token at every step, and may take it only where it is allowed."""
    end = min(engine.intake.stop_ids)
    push = {end: 100.0}
    assert ask(engine, Grammar("regex", "a{3}b?"), logit_bias=push).text == "aaa"
    reply = ask(engine, Grammar("regex", "a{3}b?"), logit_bias={end: -100.0})
    assert reply.text == "aaab"


def test_cut_off_by_its_length(engine: Engine) -> None:
    reply = ask(engine, Grammar("lark", 'start: "a"{500,500}'), max_tokens=7)
    assert reply.finish == "length" and set(reply.text) == {"a"} and len(reply.ids) == 7


def test_in_a_batch_as_alone(engine: Engine) -> None:
    grammars = [None, Grammar.schema(SCHEMA), Grammar("regex", "[a-z]{9}"), Grammar.schema(SCHEMA)]
    requests = [
        Request([5, 6, 7 + at], Sampling(max_tokens=60, temperature=1.0, seed=at, grammar=grammar))
        for at, grammar in enumerate(grammars)
    ]
    alone = [engine.generate([one])[0].ids for one in requests]
    assert [one.ids for one in engine.generate(requests)] == alone


def test_logprobs_are_of_the_raw_distribution(engine: Engine) -> None:
    free = ask(engine, Grammar("regex", "(?s:.)*"), temperature=0.0, max_tokens=1, logprobs=5)
    bound = ask(engine, Grammar("regex", "z{3}"), temperature=0.0, max_tokens=1, logprobs=5)
    assert free.logprobs and bound.logprobs
    assert free.logprobs[0].top == bound.logprobs[0].top and bound.logprobs[0].rank > 1


@pytest.mark.parametrize(
    ("kind", "text", "part"),
    [
        ("json", "{", "cannot be"),
        ("json", "[1]", "cannot be"),
        ("json", '{"type": "string", "minLength": 5, "maxLength": 2}', "Unsatisfiable"),
        ("json", '{"enum": []}', "Unsatisfiable"),
        ("json", "false", "cannot be"),
        ("json", '{"type": "foo"}', "foo"),
        ("json", '{"not": {}}', "not"),
        ("json", '{"$ref": "http://127.0.0.1/x"}', "cannot be used"),
        (
            "json",
            '{"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}',
            "cannot be followed",
        ),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(", "cannot be used"),
        ("regex", "", "is empty"),
        ("lark", 'start: "a" nothing', "nothing"),
        ("lark", "start", "cannot be"),
        ("lark", "root ::= (", "cannot be"),
        ("regex", "a" * (MOST_BYTES["regex"] + 1), "bytes"),
        ("json", '{"enum": ["' + "a" * MOST_BYTES["json"] + '"]}', "bytes"),
        ("lark", "start: " + "(" * 40 + '"a"' + ")" * 40, f"deeper than {MOST_DEPTH}"),
        ("bnf", "a", "not known"),
    ],
)
def test_refused_at_submit(engine: Engine, kind: Any, text: str, part: str) -> None:
    with pytest.raises(RequestError, match=re.escape(part)):
        engine.submit(Request([5], Sampling(grammar=Grammar(kind, text))))
    assert not engine.busy


@pytest.mark.parametrize("keys", [{"min_tokens": 3}, {"ignore_eos": True}])
def test_a_grammar_says_where_a_reply_ends(keys: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="a grammar says where"):
        Sampling(grammar=Grammar("regex", "a"), **keys)


def test_no_tokenizer() -> None:
    engine = Engine(tiny(), None)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        engine.submit(Request([5], Sampling(grammar=Grammar("regex", "a"))))


def test_hostile_grammars_end(engine: Engine) -> None:
    """They are refused, or the reply ends with an error of its own, and others are served on."""
    doubling = "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60))
    hostile = [
        Grammar("lark", f'start: a0\n{doubling}\na60: "x"'),
        Grammar("lark", 'start: start start | "a"'),
        Grammar("regex", "(.*a.{1,300}){5}"),
        Grammar("regex", "(a{1,1000}){1,1000}b"),
        Grammar.schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**6}),
    ]
    for grammar in hostile:
        try:
            reply = ask(engine, grammar, max_tokens=8)
        except Exception as error:  # noqa: BLE001
            assert isinstance(error, RequestError), error
        else:
            assert reply.finish in ("length", "stop")
    assert ask(engine, Grammar("regex", "ab")).text == "ab"


class Characters:
    """A tokenizer of whole characters: none of its tokens is a single byte of those it can write."""

    tokens = ("<unk>", "</s>", "你", "佐", "是", "时", "你好", "好", "x")
    special_ids = stop_ids = frozenset([1])
    size = len(tokens)

    @property
    def codec(self) -> Characters:
        return self

    def token_bytes(self, id: int) -> bytes:
        return b"" if id in (0, 1) else self.tokens[id].encode()

    def within(self, data: bytes) -> list[int]:
        known = {text: id for id, text in enumerate(self.tokens)}
        return [known.get(character, 0) for character in data.decode()]


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("你|佐", {"你", "佐"}),  # they begin with the same two bytes
        ("x(是|时)x", {"x是x", "x时x"}),
        ("(你好|佐)x", {"你好x", "佐x"}),
        ("x(呢|你)", {"x你"}),  # the other cannot be written
    ],
)
def test_branches_inside_a_character_without_tokens_of_bytes(pattern: str, texts: set[str]) -> None:
    tokenizer: Any = Characters()
    grammars, found = Grammars(tokenizer, tokenizer.size), set()
    under_way = [("", grammars.matcher(Grammar("regex", pattern)))]
    while under_way:
        text, matcher = under_way.pop()
        if matcher.complete:
            found.add(text)
            continue
        for id in matcher.allowed().nonzero()[0].tolist():
            fork = matcher.fork()
            fork.took(id)
            under_way.append((text + tokenizer.tokens[id], fork))
    assert found == texts


@pytest.mark.parametrize("pattern", ["x呢x", "x(呢|呵)"])
def test_a_text_without_tokens_is_refused_where_it_begins(pattern: str) -> None:
    tokenizer: Any = Characters()
    matcher = Grammars(tokenizer, tokenizer.size).matcher(Grammar("regex", pattern))
    matcher.took(tokenizer.tokens.index("x"))
    with pytest.raises(RequestError, match="cannot be continued with this model's tokens"):
        matcher.allowed()
