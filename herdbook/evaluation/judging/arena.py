"""Ratings out of votes: Elo as the votes came in, and Bradley–Terry by maximum likelihood.

Both say that A beats B with the chance 1 / (1 + 10^((R_B − R_A) / 400)); a tie is half a win. Elo
(FastChat's arena, SuperCLUE: K = 4, start 1000) depends on the order of the votes, so its figure is
the median over resampled orders. Bradley–Terry does not; its ratings have the mean 1000, and intervals
by bootstrap over the votes. A model that won or lost all it played has no finite rating: then, and only
then, each pair of models is given a tie of weight `PRIOR`, and the result says so.

With lengths in the votes, a second fit takes the difference of their logarithms, and standing first,
as covariates: what the rating would be among replies of one length, in no order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from herdbook.errors import DataError
from herdbook.evaluation.judging.votes import Vote
from herdbook.evaluation.statistics import Interval, wilson

K, START, SCALE = 4.0, 1000.0, 400.0 / math.log(10)
#: weight of the tie between all pairs that bounds a rating which the votes leave without bound
PRIOR = 0.5
DRAWS = 300
#: Newton steps at most, and the step (in natural logarithms of odds) at which it has arrived
_STEPS, _NEAR = 100, 1e-9


@dataclass(frozen=True)
class Fit:
    """`ratings` in the order of the models; `slopes` of the covariates, in points."""

    ratings: np.ndarray
    slopes: np.ndarray
    converged: bool
    bounded: bool  # by the prior, as the votes alone give no finite ratings


def models_of(votes: Sequence[Vote]) -> list[str]:
    return sorted({name for vote in votes for name in (vote.model_a, vote.model_b)})


# ---------------------------------------------------------------------------------------------- Elo


def elo(votes: Sequence[Vote], k: float = K, start: float = START) -> dict[str, float]:
    """Ratings after the votes in their order."""
    names = models_of(votes)
    table = _table(votes, names)
    ratings = _elo(table, iter(np.arange(len(table))[:, None]), len(names), k, start)[0]
    return {name: float(value) for name, value in zip(names, ratings, strict=True)}


def elo_median(
    votes: Sequence[Vote], k: float = K, start: float = START, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Median and 95 % interval over votes drawn with replacement, in random order."""
    names = models_of(votes)
    table = _table(votes, names)
    dice = np.random.default_rng(seed)
    orders = (dice.integers(0, len(table), draws) for _ in table)
    found = _elo(table, orders, len(names), k, start)
    middle, low, high = np.quantile(found, [0.5, 0.025, 0.975], axis=0)
    return {
        name: Interval(float(middle[n]), float(low[n]), float(high[n]))
        for n, name in enumerate(names)
    }


def _elo(
    table: np.ndarray, orders: Iterator[np.ndarray], models: int, k: float, start: float
) -> np.ndarray:
    """orders: for each step, which vote every draw takes → ratings [draw, model]."""
    ratings = np.zeros((0, models))
    for votes in orders:
        if not len(ratings):
            ratings, rows = np.full((len(votes), models), start), np.arange(len(votes))
        a, b = table[votes, 0].astype(int), table[votes, 1].astype(int)
        expected = 1 / (1 + np.exp((ratings[rows, b] - ratings[rows, a]) / SCALE))
        change = k * (table[votes, 2] - expected)
        ratings[rows, a] += change
        ratings[rows, b] -= change
    return ratings


def _table(votes: Sequence[Vote], names: Sequence[str]) -> np.ndarray:
    """[vote, (a, b, score of a)]"""
    place = {name: n for n, name in enumerate(names)}
    scores = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}
    return np.array([[place[v.model_a], place[v.model_b], scores[v.winner]] for v in votes])


# ------------------------------------------------------------------------------------ Bradley–Terry


def bradley_terry(wins: np.ndarray) -> Fit:
    """wins[i, j]: how often i beat j, ties as half to both sides."""
    bounded = not _strong(wins)
    if bounded:
        wins = wins + PRIOR / 2 * (1 - np.eye(len(wins)))
    ones, twos = np.triu_indices(len(wins), 1)
    games = wins[ones, twos] + wins[twos, ones]
    played = games > 0
    ones, twos, games = ones[played], twos[played], games[played]
    design = np.zeros((len(ones), len(wins)))
    rows = np.arange(len(ones))
    design[rows, ones], design[rows, twos] = 1, -1
    theta, converged = _logistic(design, wins[ones, twos] / games, games, len(wins))
    return Fit(START + SCALE * theta, np.zeros(0), converged, bounded)


def with_covariates(table: np.ndarray, covariates: np.ndarray, models: int) -> Fit:
    """Ratings and the covariates' slopes together. covariates: [vote, c], from a's point of view."""
    design = np.zeros((len(table), models + covariates.shape[1]))
    rows = np.arange(len(table))
    design[rows, table[:, 0].astype(int)] = 1
    design[rows, table[:, 1].astype(int)] -= 1
    design[:, models:] = covariates
    scores, weights = table[:, 2], np.ones(len(table))
    bounded = not _strong(_wins(table, models))
    if bounded:
        ones, twos = np.triu_indices(models, 1)
        extra = np.zeros((len(ones), design.shape[1]))
        pairs = np.arange(len(ones))
        extra[pairs, ones], extra[pairs, twos] = 1, -1
        design = np.concatenate([design, extra])
        scores = np.concatenate([scores, np.full(len(ones), 0.5)])
        weights = np.concatenate([weights, np.full(len(ones), PRIOR)])
    theta, converged = _logistic(design, scores, weights, models)
    return Fit(START + SCALE * theta[:models], SCALE * theta[models:], converged, bounded)


def _logistic(
    design: np.ndarray, scores: np.ndarray, weights: np.ndarray, models: int
) -> tuple[np.ndarray, bool]:
    """Maximum likelihood by Newton's method, halving steps that go down; the models' mean is 0.

    The likelihood is concave, so what converges is the optimum.
    """
    theta = np.zeros(design.shape[1])
    pin = np.zeros((len(theta), len(theta)))
    pin[:models, :models] = 1.0  # takes the direction in which nothing changes

    def value(at: np.ndarray) -> float:
        z = design @ at
        return float((weights * (scores * z - np.logaddexp(0, z))).sum())

    now, converged = value(theta), False
    for _ in range(_STEPS):
        chance = 0.5 * (1 + np.tanh(design @ theta / 2))
        slope = design.T @ (weights * (scores - chance))
        curve = (design * (weights * chance * (1 - chance))[:, None]).T @ design + pin
        step = np.linalg.lstsq(curve, slope, rcond=None)[0]
        while (then := value(theta + step)) < now - 1e-9 * abs(now) and np.abs(step).max() > _NEAR:
            step = step / 2
        theta, now = theta + step, then
        converged = bool(np.abs(step).max() < _NEAR)
        if converged:
            break
    theta[:models] -= theta[:models].mean()
    return theta, converged


def _strong(wins: np.ndarray) -> bool:
    """Can every model be reached from every other one along wins? Just then finite ratings exist
    (Ford 1957)."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(max(2, len(wins)))))):
        reach = reach.astype(float) @ reach.astype(float) > 0
    return bool(reach.all())


def _wins(table: np.ndarray, models: int) -> np.ndarray:
    a, b = table[:, 0].astype(int), table[:, 1].astype(int)
    wins = np.zeros((models, models))
    np.add.at(wins, (a, b), table[:, 2])
    np.add.at(wins, (b, a), 1 - table[:, 2])
    return wins


# -------------------------------------------------------------------------------------- leaderboard


def leaderboard(votes: Sequence[Vote], draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Everything that is told of an arena, best model first.

    A model's rank is one more than the number of models whose interval lies wholly above its own.
    Errors: DataError where there are no votes, or two groups of models never met.
    """
    if not votes:
        raise DataError("an arena", rule="has no anonymous votes", next="vote first")
    names = models_of(votes)
    table = _table(votes, names)
    wins = _wins(table, len(names))
    _check_met(wins + wins.T, names)
    fit = bradley_terry(wins)
    dice = np.random.default_rng(seed)
    fits = [
        bradley_terry(_wins(table[dice.integers(0, len(table), len(table))], len(names)))
        for _ in range(draws)
    ]
    low, high = np.quantile([one.ratings for one in fits], [0.025, 0.975], axis=0)
    online = elo_median(votes, draws=draws, seed=seed)
    control = _controlled(votes, table, len(names))
    games = wins + wins.T
    rows = [
        {
            "model": name,
            "rating": float(fit.ratings[n]),
            "low": float(min(low[n], fit.ratings[n])),
            "high": float(max(high[n], fit.ratings[n])),
            "elo": online[name].value,
            "votes": round(float(games[n].sum())),
            "score": float(wins[n].sum() / games[n].sum()),
            "rank": 0,
            **({"controlled": control["ratings"][n]} if control else {}),
        }
        for n, name in enumerate(names)
    ]
    rows.sort(key=lambda row: (-row["rating"], row["model"]))
    for row in rows:
        row["rank"] = 1 + sum(other["low"] > row["high"] for other in rows)
    return {
        "models": rows,
        "votes": len(votes),
        "ties": sum(vote.winner == "tie" for vote in votes),
        "position": position(votes),
        "converged": fit.converged and all(one.converged for one in fits),
        "bounded": fit.bounded,
        "draws_bounded": sum(one.bounded for one in fits),
        "prior": PRIOR,
        **(
            {"length_points": control["length"], "first_points": control["first"]}
            if control
            else {}
        ),
    }


def position(votes: Sequence[Vote]) -> dict[str, float] | None:
    """The share of decided votes that what stood first has won; 0.5 is without bias where every pair
    met as often in both orders. None: none was decided."""
    first = sum(vote.winner == "model_a" for vote in votes)
    decided = first + sum(vote.winner == "model_b" for vote in votes)
    return wilson(first, decided).to_json() if decided else None


def _controlled(votes: Sequence[Vote], table: np.ndarray, models: int) -> dict[str, Any] | None:
    """Ratings at equal length; `length` is what twice the length brings, `first` what standing first
    does, both in points. None: not every vote has lengths, or they do not differ."""
    if any(vote.length_a is None or vote.length_b is None for vote in votes):
        return None
    ratios = np.array([math.log2((1 + v.length_a) / (1 + v.length_b)) for v in votes])  # type: ignore[operator]
    if not ratios.any():
        return None
    covariates = np.stack([ratios, np.ones(len(votes))], axis=1)
    fit = with_covariates(table, covariates, models)
    if not fit.converged:
        return None
    return {
        "ratings": fit.ratings.tolist(),
        "length": float(fit.slopes[0]),
        "first": float(fit.slopes[1]),
    }


def _check_met(games: np.ndarray, names: Sequence[str]) -> None:
    """Ratings compare only what is linked by votes."""
    met, fresh = {0}, [0]
    while fresh:
        new = [int(n) for n in np.flatnonzero(games[fresh.pop()]) if int(n) not in met]
        met.update(new)
        fresh += new
    if len(met) < len(names):
        apart = [name for n, name in enumerate(names) if n not in met]
        raise DataError(
            f"{', '.join(apart)[:200]}",
            rule=f"met none of the models that {names[0]} is linked with",
            next="collect votes between the two groups, or rate them apart",
        )
