"""Ratings against closed forms, scipy's optimum, simulated strengths, and a published table."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from herdbook.errors import DataError
from herdbook.evaluation.judging import arena, votes
from herdbook.evaluation.judging import page as arena_page
from herdbook.evaluation.judging.arena import bradley_terry, elo, elo_median, leaderboard
from herdbook.evaluation.judging.votes import Vote


def duel(a: int, b: int, ties: int = 0) -> list[Vote]:
    return [
        Vote("one", "two", name)
        for name, count in (("model_a", a), ("model_b", b), ("tie", ties))
        for _ in range(count)
    ]


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 50))
def test_two_models_in_closed_form(won: int, lost: int, ties: int) -> None:
    wins = np.array([[0, won + ties / 2], [lost + ties / 2, 0]])
    fit = bradley_terry(wins)
    expected = 400 * math.log10((won + ties / 2) / (lost + ties / 2))
    assert fit.converged and not fit.bounded
    assert fit.ratings[0] - fit.ratings[1] == pytest.approx(expected, abs=1e-6)
    assert fit.ratings.mean() == pytest.approx(1000)


def test_elo_step_by_step() -> None:
    found = elo([Vote("a", "b", "model_a"), Vote("b", "a", "tie"), Vote("a", "c", "model_b")])
    a, b, c = 1002.0, 998.0, 1000.0
    expected = 1 / (1 + 10 ** ((a - b) / 400))  # of b
    a, b = a - 4 * (0.5 - expected), b + 4 * (0.5 - expected)
    beats = 1 / (1 + 10 ** ((c - a) / 400))
    a, c = a - 4 * beats, c + 4 * beats
    assert found == pytest.approx({"a": a, "b": b, "c": c})


def test_elo_s_median_does_not_know_the_order() -> None:
    ordered = duel(300, 100)
    found = elo_median(ordered, draws=200)
    assert elo(ordered)["one"] < elo(ordered[::-1])["one"] - 50
    assert found["one"].low < found["one"].value < found["one"].high
    again = elo_median(ordered[::-1], draws=200)
    assert again["one"].value == pytest.approx(found["one"].value, abs=12)
    assert found["one"].value + found["two"].value == pytest.approx(2000)


@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(st.integers(0, 9), min_size=n * n, max_size=n * n).map(
            lambda cells: np.array(cells, float).reshape(n, n)
        )
    )
)
@settings(deadline=None)
def test_it_is_scipy_s_optimum(wins: np.ndarray) -> None:
    np.fill_diagonal(wins, 0)
    fit = bradley_terry(wins)
    assert fit.converged
    if fit.bounded:
        wins = wins + arena.PRIOR / 2 * (1 - np.eye(len(wins)))

    def loss(theta: np.ndarray) -> float:
        gaps = theta[:, None] - theta[None]
        return float((wins * np.logaddexp(0, -gaps)).sum() + 1e-9 * theta.sum() ** 2)

    best = optimize.minimize(loss, np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-8})
    ours = (fit.ratings - 1000) / arena.SCALE
    assert loss(ours) <= best.fun + 1e-6
    assert ours == pytest.approx(best.x - best.x.mean(), abs=2e-3)


def test_all_won_has_a_bound_and_says_so() -> None:
    fit = bradley_terry(np.array([[0.0, 9], [0, 0]]))
    assert fit.bounded and fit.converged
    half = arena.PRIOR / 2
    assert fit.ratings[0] - fit.ratings[1] == pytest.approx(400 * math.log10((9 + half) / half))
    board = leaderboard(duel(9, 0), draws=100)
    assert board["bounded"] and board["draws_bounded"] == 100
    assert not leaderboard(duel(90, 10), draws=100)["bounded"]
    cycle = np.array(
        [[0.0, 5, 0], [0, 0, 5], [5, 0, 0]]
    )  # nobody won all: strong though no rematch
    assert not bradley_terry(cycle).bounded
    assert bradley_terry(cycle).ratings == pytest.approx([1000] * 3)


def simulate(
    strengths: dict[str, float], count: int, seed: int, length: float = 0.0, first: float = 0.0
) -> list[Vote]:
    """Votes of models with known ratings; `length` points for each doubling, `first` for standing so.
    Weaker models write longer."""
    dice = np.random.default_rng(seed)
    names = list(strengths)
    found = []
    for _ in range(count):
        a, b = dice.choice(len(names), 2, replace=False)
        lengths = [float(dice.lognormal(5 + n / 2, 0.6)) for n in (a, b)]
        gap = strengths[names[a]] - strengths[names[b]] + first
        gap += length * math.log2((1 + lengths[0]) / (1 + lengths[1]))
        chance = 1 / (1 + 10 ** (-gap / 400))
        winner = "model_a" if dice.random() < chance else "model_b"
        found.append(Vote(names[a], names[b], winner, True, *lengths))
    return found


STRENGTHS = {"gamma": 1150.0, "alpha": 1050.0, "delta": 950.0, "beta": 850.0}


def test_recovers_strengths_and_its_intervals_cover() -> None:
    board = leaderboard(simulate(STRENGTHS, 4000, seed=3), draws=100)
    assert [row["model"] for row in board["models"]] == list(STRENGTHS)
    assert [row["rank"] for row in board["models"]] == [1, 2, 3, 4]
    for row in board["models"]:
        assert row["rating"] == pytest.approx(STRENGTHS[row["model"]], abs=25)
    held = 0
    for seed in range(60):
        board = leaderboard(simulate(STRENGTHS, 400, seed), draws=150)
        held += sum(row["low"] <= STRENGTHS[row["model"]] <= row["high"] for row in board["models"])
    assert 0.88 < held / 240 < 0.99


def test_equals_share_a_rank() -> None:
    board = leaderboard(duel(52, 48), draws=100)
    assert [row["rank"] for row in board["models"]] == [1, 1]


def test_length_and_position_are_taken_out() -> None:
    """Longer replies and what stands first win more: ratings alone mislead, controlled ones do not."""
    board = leaderboard(simulate(STRENGTHS, 8000, 5, length=120, first=60), draws=100)
    assert board["length_points"] == pytest.approx(120, abs=15)
    assert board["first_points"] == pytest.approx(60, abs=15)
    for row in board["models"]:
        assert row["controlled"] == pytest.approx(STRENGTHS[row["model"]], abs=30)
    raw = {row["model"]: row["rating"] for row in board["models"]}
    assert raw["gamma"] < raw["alpha"] + 50  # by strength it is 100
    assert board["position"]["low"] > 0.5
    assert "controlled" not in leaderboard(duel(5, 4), draws=100)["models"][0]


def test_models_that_never_met_are_refused() -> None:
    pairs = [Vote("a", "b", "tie"), Vote("c", "d", "model_a")]
    with pytest.raises(DataError, match="c, d met none of the models that a is linked with"):
        leaderboard(pairs)
    with pytest.raises(DataError, match="no anonymous votes"):
        leaderboard([])


# ---------------------------------------------------------------------------------------------- log


def test_log_is_appended_to_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    some = [
        Vote("a", "b", "tie", extra={"question": "你好\u2028?"}),
        Vote("b", "a", "model_a", length_a=3, length_b=4.5),
        Vote("a", "b", "model_b", anonymous=False),
    ]
    for one in some:
        votes.append(path, one)
    assert path.read_bytes().count(b"\n") == 3
    assert votes.read(path) == votes.Votes(tuple(some[:2]), named=1)
    with pytest.raises(DataError, match="meet itself"):
        votes.append(path, Vote("a", "a", "tie"))
    path.write_bytes(path.read_bytes()[:-1])
    whole = path.read_bytes()
    with pytest.raises(DataError, match="ends in the middle of a line"):
        votes.append(path, some[0])
    assert path.read_bytes() == whole


GOOD = {"model_a": "a", "model_b": "b", "winner": "tie", "anonymous": True}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_a": ""}, "has no model_a"),
        ({"model_b": 3}, "has no model_b"),
        ({"model_b": "a"}, "lets 'a' meet itself"),
        ({"winner": "a"}, "has winner 'a', not one of model_a, model_b, tie"),
        ({"winner": None}, "has winner None"),
        ({"anonymous": None}, "does not say whether it was anonymous"),
        ({"anonymous": "yes"}, "does not say whether it was anonymous"),
        ({"length_a": 3}, r"has lengths \[3, None\]"),
        ({"length_a": -1, "length_b": 1}, "has lengths"),
        ({"length_a": True, "length_b": 1}, "has lengths"),
        ({"length_a": float("nan"), "length_b": 1}, "has lengths"),
    ],
)
def test_a_wrong_vote_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD | change)}\n")
    with pytest.raises(DataError, match=f"line 3, {says}"):
        votes.read(path)


def test_what_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        votes.read(path)
    for text, says in (
        ("{", "is no JSON"),
        ("[1]", "is no JSON object"),
        ("[" * 99999, "is no JSON"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            votes.read(path)


# ----------------------------------------------------------------------------------- page, real votes


def test_page_is_bilingual_and_escaped() -> None:
    some = [Vote("<script>alert(1)</script>", "b&b", "model_a", True, 30, 20), *(
        Vote("b&b", "<script>alert(1)</script>", w, True, 25, 40) for w in ("model_a", "tie")
    )]  # fmt: skip
    page = arena_page.arena_page(leaderboard(some, draws=100), "my <votes>")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "b&amp;b" in page
    assert "my &lt;votes&gt;" in page
    assert page.count('lang="en"') - 1 == page.count('lang="zh"')
    assert "排行榜" in page and "Leaderboard" in page
    bounded = arena_page.arena_page(leaderboard(duel(5, 0), draws=100), "x")
    assert "no finite rating" in bounded and "no finite rating" not in page


def test_qlora_s_battles(shared_data: Callable[[str], Path]) -> None:
    """GPT-4's 4,467 verdicts on Vicuna-80 between 8 models. The order of QLoRA's table 1 (there
    Elo: GPT-4 1348, Guanaco 65B 1022, 33B 992, Vicuna 974, ChatGPT 966, Guanaco 13B 916, Bard 902,
    7B 879)."""
    path = shared_data("qlora_arena/gpt4_battles_vicuna80.jsonl.gz")
    rows = [
        json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line
    ]
    some = [
        Vote(row["model_a"], row["model_b"], row["winner"])
        for row in rows
        if row["winner"] is not None
    ]
    board = leaderboard(some, draws=100)
    assert len(some) == 4467 and board["converged"] and not board["bounded"]
    published = {
        "gpt4": 1348, "65b-guanaco": 1022, "30b-guanaco": 992, "vicuna-13b": 974, "gpt35": 966,
        "13b-guanaco": 916, "bard": 902, "7b-guanaco": 879,
    }  # fmt: skip
    assert [row["model"] for row in board["models"]] == list(published)
    for row in board["models"]:
        assert row["elo"] == pytest.approx(published[row["model"]], abs=6)
    assert board["position"]["value"] == pytest.approx(2512 / (2512 + 1355))
