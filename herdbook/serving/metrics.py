"""Numbers for Prometheus, in its text format (version 0.0.4).

https://prometheus.io/docs/instrumenting/exposition_formats/

Counters of a model are written by its worker's thread alone and outlive an unloading.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from herdbook.engine.request import Reply

TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of values up to each of `bounds`, their number and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last one: above all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class ModelNumbers:
    """What one model's replies took: tokens, and seconds to the first token and for each further."""

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.to_first = Histogram((0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60))
        self.per_token = Histogram(
            (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
        )

    def ended(self, reply: Reply) -> None:
        """A reply is over, be it finished, cancelled or failed."""
        self.prompt_tokens += reply.prompt_tokens
        self.cached_tokens += reply.cached_tokens
        self.completion_tokens += reply.completion_tokens
        if reply.completion_tokens:
            self.to_first.observe(reply.waiting_s)
        if reply.completion_tokens > 1:
            self.per_token.observe(reply.decoding_s / (reply.completion_tokens - 1))


Labels = Mapping[str, str]


class Page:
    """The text, metric by metric."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"

    def metric(
        self, kind: str, name: str, about: str, samples: Iterable[tuple[Labels, Any]]
    ) -> None:
        """kind: counter, gauge or histogram. samples: labels → number (or Histogram)."""
        samples = list(samples)
        if samples:
            self._lines += [f"# HELP herdbook_{name} {about}", f"# TYPE herdbook_{name} {kind}"]
        for labels, value in samples:
            rows = _rows(value) if isinstance(value, Histogram) else [("", {}, value)]
            for suffix, more, number in rows:
                self._lines.append(
                    f"herdbook_{name}{suffix}{_labels({**labels, **more})} {number:.10g}"
                )


def _rows(one: Histogram) -> Iterator[tuple[str, Labels, float]]:
    total = 0
    for bound, count in zip((*one.bounds, None), one.counts, strict=True):
        total += count
        yield "_bucket", {"le": "+Inf" if bound is None else f"{bound:g}"}, total
    yield "_sum", {}, one.sum
    yield "_count", {}, total


def _labels(labels: Labels) -> str:
    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    pairs = ",".join(f'{name}="{quoted(value)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""
