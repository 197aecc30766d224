"""Choosing tokens: tables worked out by hand, and frequencies of many draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from herdbook.engine.request import Sampling
from herdbook.engine.sampling import Chooser, candidates, choose
from herdbook.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_tokens", 0, "a whole number, at least 1"),
        ("max_tokens", 2.5, "a whole number"),
        ("temperature", -0.1, "between 0 and 100"),
        ("temperature", math.nan, "a number"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.5, "between 0 and 1"),
        ("min_p", "0.1", "a number"),
        ("seed", -1, "between 0"),
        ("seed", True, "a whole number"),
        ("stop", ("",), "non-empty strings"),
        ("stop", 7, "a string or a list"),
        ("presence_penalty", 3.0, "between -2 and 2"),
        ("frequency_penalty", -3.0, "between -2 and 2"),
        ("repetition_penalty", 0.0, "above 0"),
        ("ignore_eos", 1, "true or false"),
        ("logprobs", 21, "between 0 and 20"),
        ("logprobs", True, "a whole number"),
        ("prompt_logprobs", -1, "between 0 and 20"),
        ("min_tokens", 257, "above max_tokens=256"),
        ("min_tokens", -1, "at least 0"),
        ("stop_token_ids", 7, "a list of token ids"),
        ("stop_token_ids", ("7",), "a list of token ids"),
        ("logit_bias", 7, "map token ids to numbers"),
        ("logit_bias", {"7": 1.0}, "map token ids to numbers"),
        ("logit_bias", {7: 101}, "-100 to 100"),
        ("logit_bias", {7: math.nan}, "-100 to 100"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: Any, rule: str) -> None:
    with pytest.raises(RequestError) as caught:
        Sampling(**{name: value})
    assert str(caught.value).startswith(f"{name}={value!r}")
    assert rule in str(caught.value)
    assert f"next: correct {name}" in str(caught.value)


def test_one_stop_string_may_stand_alone() -> None:
    assert Sampling(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def row(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def logits_of(*probabilities: float) -> np.ndarray:
    return np.log(row(*probabilities))


def kept(logits: np.ndarray, sampling: Sampling) -> dict[int, float]:
    probabilities, tokens = candidates(logits, sampling)
    ids = range(len(logits)) if tokens is None else tokens.tolist()
    total = float(probabilities.sum())
    return {i: round(float(p) / total, 4) for i, p in zip(ids, probabilities, strict=True)}


FIVE = logits_of(0.1, 0.4, 0.05, 0.25, 0.2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.25, 4: 0.2}),
        ({"top_k": 2}, {1: 0.6154, 3: 0.3846}),
        ({"top_k": 9}, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.25, 4: 0.2}),
        ({"top_p": 0.6}, {1: 0.6154, 3: 0.3846}),
        ({"top_p": 0.66}, {1: 0.4706, 3: 0.2941, 4: 0.2353}),
        ({"top_p": 0.01}, {1: 1.0}),
        ({"min_p": 0.45}, {1: 0.4706, 3: 0.2941, 4: 0.2353}),
        # after top-k 3 the probabilities are .47 .29 .24: top-p .7 keeps two of them
        ({"top_k": 3, "top_p": 0.7}, {1: 0.6154, 3: 0.3846}),
        ({"top_p": 0.9, "min_p": 0.6}, {1: 0.6154, 3: 0.3846}),
        ({"temperature": 0.5}, {0: 0.0364, 1: 0.5818, 2: 0.0091, 3: 0.2273, 4: 0.1455}),
    ],
)
def test_candidates_by_hand(settings: dict[str, Any], expected: dict[int, float]) -> None:
    assert kept(FIVE, Sampling(**({"temperature": 1.0} | settings))) == expected


def test_a_flat_nucleus_goes_past_the_head() -> None:
    probabilities, tokens = candidates(
        np.zeros(5000, np.float32), Sampling(temperature=1.0, top_p=0.5)
    )
    assert tokens is not None and len(set(tokens.tolist())) == len(tokens)
    assert abs(len(probabilities) - 2500) <= 2


def test_draws_follow_the_probabilities() -> None:
    chooser = Chooser(Sampling(temperature=1.0, seed=5), [0], 5)
    draws = [chooser.choose(FIVE) for _ in range(4000)]
    for token, p in enumerate([0.1, 0.4, 0.05, 0.25, 0.2]):
        assert abs(draws.count(token) / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_penalties_by_hand() -> None:
    """Prompt [0, 3], reply [1, 1, 4].

    token  logit  seen  count   ÷ or × 2     − .5 × count   − .25 × (count > 0)
    0       2.0   yes     0       1.0            1.0              1.0
    1       3.0   yes     2       1.5            0.5              0.25
    2      -1.0   no      0      -1.0           -1.0             -1.0
    3      -0.5   yes     0      -1.0           -1.0             -1.0
    4       0.0   yes     1       0.0           -0.5             -0.75
    """
    sampling = Sampling(
        temperature=1.0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25
    )
    chooser = Chooser(sampling, [0, 3], 5)
    for token in (1, 1, 4):
        chooser.took(token)
    logits = row(2.0, 3.0, -1.0, -0.5, 0.0)
    penalised = chooser.penalise(logits)
    assert penalised.tolist() == [1.0, 0.25, -1.0, -1.0, -0.75]
    assert logits.tolist() == [2.0, 3.0, -1.0, -0.5, 0.0]


def test_greedy_with_penalties() -> None:
    chooser = Chooser(Sampling(presence_penalty=1.5), [0], 3)
    logits = row(1.0, 2.0, 0.0)
    first = chooser.choose(logits)
    chooser.took(first)
    assert (first, chooser.choose(logits)) == (1, 0)


def test_a_batch_is_its_rows() -> None:
    logits = np.random.default_rng(1).standard_normal((4, 50), np.float32)
    settings = [
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.7, top_p=0.9, seed=4),
        Sampling(repetition_penalty=1.3),
    ]

    def choosers() -> list[Chooser]:
        return [Chooser(s, [1], 50) for s in settings]

    together = choose(logits, choosers())
    alone = [choose(logits[i : i + 1], [c])[0] for i, c in enumerate(choosers())]
    assert together == alone
    assert together[0] == int(logits[0].argmax())


def test_a_bad_row_fails_alone() -> None:
    logits = np.random.default_rng(2).standard_normal((3, 10), np.float32)
    logits[1, 4] = math.nan
    first, bad, last = choose(logits, [Chooser(Sampling(), [0], 10) for _ in range(3)])
    assert isinstance(bad, ArithmeticError) and "not finite" in str(bad)
    assert first == int(logits[0].argmax()) and last == int(logits[2].argmax())


def test_without_seed_draws_differ() -> None:
    flat = np.zeros(1000, np.float32)
    draws = {
        Chooser(Sampling(temperature=1.0, seed=None), [0], 1000).choose(flat) for _ in range(8)
    }
    assert len(draws) > 1


@pytest.mark.parametrize("temperature", [1e-40, 1e-20, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = row(1.0, 90.0, 89.0, -3.0)
    probabilities, _ = candidates(logits, Sampling(temperature=temperature))
    assert probabilities.tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_is_left_nothing_is_drawn(temperature: float) -> None:
    chooser = Chooser(Sampling(temperature=temperature, min_tokens=1), [0], 2, ends=[0, 1])
    with pytest.raises(ArithmeticError, match="nothing is left"):
        chooser.choose(row(1.0, 2.0))
