"""A scaling law: the loss of models of several sizes against the arithmetic that went into them.

    C = 6 · parameters · tokens trained on       (floating-point operations)
    L = (C / C₀)^(−α)                            a line in logarithms, fitted by least squares

``scaling.json``: {"points": [{"ref", "parameters", "tokens", "compute", "loss"}, …], "alpha", "c0",
"largest_error"}; L is in nats a token of the held-out documents, the error in nats between a model and
the law. Hoffmann et al., arXiv 2203.15556; Dey et al. (Cerebras-GPT), arXiv 2304.03208.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar

import numpy as np

from herdbook.book.step import Bench, Inputs, Step, require
from herdbook.engine.loading import load
from herdbook.errors import ConfigError, DataError
from herdbook.evaluation.charts import power_law
from herdbook.evaluation.html import document
from herdbook.evaluation.perplexity import perplexity
from herdbook.evaluation.report import Heldout
from herdbook.files.atomic import write_json, write_text


@dataclass(frozen=True)
class Scaling(Step):
    """Fit loss against compute over models of several sizes, and draw it."""

    kind: ClassVar[str] = "report"
    models: Inputs = ()  # as Tune made them
    data: Inputs = ()  # datasets of text whose held-out documents are scored

    def make(self, bench: Bench) -> dict[str, Any]:
        require(self, "models", "data")
        text = Heldout.of(bench.inputs["data"]).text
        if not text:
            raise DataError(
                "no document is held out", rule="to score the models on", next="set heldout to 0.02"
            )
        points = []
        for artifact in bench.inputs["models"]:
            if "total_tokens" not in artifact.metrics:
                raise ConfigError(
                    f"{artifact.ref} does not say how many tokens it was trained on",
                    rule="and compute is counted from them",
                    next="give models that Tune made",
                )
            model = load(str(artifact.path))
            parameters, tokens = model.decoder.parameter_count(), artifact.metrics["total_tokens"]
            scored = perplexity(model, text, window=min(512, model.config.max_pos))
            points.append(
                {
                    "ref": artifact.ref,
                    "parameters": parameters,
                    "tokens": tokens,
                    "compute": 6 * parameters * tokens,
                    "loss": math.log(scored["perplexity"]),
                }
            )
            bench.progress.say(f"  {artifact.ref}: {points[-1]['loss']:.3f} nats a token")
        found = fit(points)
        write_json(bench.out / "scaling.json", {"points": points, **found})
        write_text(bench.out / "scaling.html", _page(points, found))
        return {"models": len(points), **found}


def fit(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """α and C₀ of the law, and how far the worst model is from it; two models at least.

    >>> round(fit([{"compute": 1e9, "loss": 4.0}, {"compute": 1e12, "loss": 2.0}])["alpha"], 4)
    0.1003
    """
    if len({point["compute"] for point in points}) < 2:
        raise ConfigError(
            f"{len(points)} models of one compute", rule="and a law needs two sizes", next="add one"
        )
    x = np.log([point["compute"] for point in points])
    y = np.log([point["loss"] for point in points])
    slope, start = np.polyfit(x, y, 1)
    errors = np.abs(np.exp(start + slope * x) - np.exp(y))
    return {
        "alpha": float(-slope),
        "c0": float(np.exp(-start / slope)) if slope else math.inf,
        "largest_error": float(errors.max()),
    }


def _page(points: Sequence[Mapping[str, Any]], law: Mapping[str, float]) -> str:
    rows = "".join(
        f"<tr><td>{escape(one['ref'])}</td><td>{one['parameters']:,}</td><td>{one['tokens']:,}</td>"
        f"<td>{one['compute']:.2e}</td><td>{one['loss']:.3f}</td></tr>"
        for one in points
    )
    told = f"L = (C / {law['c0']:.3g})<sup>−{law['alpha']:.4f}</sup>"
    chart = power_law([(one["compute"], one["loss"]) for one in points], law["alpha"], law["c0"])
    table = (
        "<table><tr><th>model</th><th>parameters</th><th>tokens</th><th>compute</th><th>nats</th></tr>"
        f"{rows}</table>"
    )
    head = f"<header><h1>{told}</h1></header>"
    return document("Scaling", [head, *(f"<section>{one}</section>" for one in (chart, table))])
