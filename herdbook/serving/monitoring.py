"""GET /health and /metrics: how the server is, for a load balancer and for Prometheus; and /usage, for
the controller of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, Response

from herdbook.serving.metrics import TYPE, Page
from herdbook.serving.models import Models
from herdbook.serving.visits import Counts

#: of `Engine.stats()`, since the model was loaded
ENGINE_COUNTERS = {
    "drafted_tokens": "Tokens that speculation guessed.",
    "accepted_tokens": "Of them, those that were right.",
    "preemptions": "Requests that gave their pages back for others, and computed them again.",
}


def add(api: FastAPI, models: Models, counts: Counts) -> None:
    """Put the routes into the application."""

    @api.get("/health")
    async def health() -> JSONResponse:
        states = {
            name: {"status": worker.state, "open_requests": worker.open}
            for name, worker in models.items()
        }
        ok = models.healthy
        body = {"status": "ok" if ok else "unavailable", "models": states}
        return JSONResponse(body, status_code=200 if ok else 503)

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(str(await _page(models, counts)), media_type=TYPE)

    @api.get("/usage/{name}")
    async def usage(name: str) -> dict[str, Any]:
        """For the controller in front: what a visit used that it sent under this name and left."""
        if name not in counts.sent:
            raise HTTPException(404)
        return await asyncio.shield(counts.sent[name])


async def _page(models: Models, counts: Counts) -> Page:
    page = Page()
    _visits(page, counts)
    stats = await asyncio.gather(*(worker.stats() for worker in models.values()))
    workers = [({"model": worker.name}, worker) for worker in models.values()]

    def each(kind: str, name: str, about: str, of: Any) -> None:
        page.metric(kind, name, about, [(labels, of(worker)) for labels, worker in workers])

    def state(name: str, about: str, key: str, kind: str = "gauge") -> None:
        found = zip(workers, stats, strict=True)
        page.metric(kind, name, about, [(labels, s[key]) for (labels, _), s in found if s])

    numbers = [
        ("prompt_tokens_total", "Tokens of prompts.", "prompt_tokens"),
        ("cached_tokens_total", "Of them, taken from the prefix cache.", "cached_tokens"),
        ("completion_tokens_total", "Tokens of replies.", "completion_tokens"),
    ]
    for name, about, key in numbers:
        each("counter", name, about, lambda worker, key=key: getattr(worker.numbers, key))
    each(
        "gauge",
        "prefix_hit_ratio",
        "Share of prompt tokens that came from the prefix cache.",
        lambda one: one.numbers.cached_tokens / max(1, one.numbers.prompt_tokens),
    )
    each(
        "histogram",
        "time_to_first_token_seconds",
        "From a request's entry into the engine to its first token.",
        lambda worker: worker.numbers.to_first,
    )
    each(
        "histogram",
        "time_per_output_token_seconds",
        "Mean time of a reply's further tokens.",
        lambda worker: worker.numbers.per_token,
    )
    each("gauge", "model_loaded", "1 when the model is in memory.", lambda one: int(one.ready))
    each("gauge", "model_bytes", "What the model takes, cache included.", lambda one: one.bytes)
    each("gauge", "open_requests", "Requests that run or wait in the engine.", lambda one: one.open)
    each(
        "gauge",
        "requests_waiting_to_load",
        "Requests that wait for the model to load.",
        lambda one: models.waiting[one.name],
    )
    for name, about in ENGINE_COUNTERS.items():
        state(f"{name}_total", about, name, kind="counter")
    state("requests_running", "Requests in the batch.", "running")
    state("requests_queued", "Requests that wait for pages or a place.", "waiting")
    state("pages", "Pages of the cache of keys and values.", "pages")
    state("pages_used", "Pages that running requests hold.", "pages_used")
    state("pages_cached", "Free pages whose contents later prompts can share.", "pages_cached")
    return page


def _visits(page: Page, counts: Counts) -> None:
    for name, about, labels, counted in (
        (
            "requests_total",
            "Requests by model (empty: refused before one was found) and outcome.",
            ("model", "outcome"),
            counts.visits,
        ),
        (
            "key_requests_total",
            "Requests by API key and outcome.",
            ("key", "outcome"),
            counts.keys,
        ),
    ):
        page.metric(
            "counter",
            name,
            about,
            [(dict(zip(labels, by, strict=True)), n) for by, n in sorted(counted.items())],
        )
    page.metric(
        "counter",
        "key_tokens_total",
        "Tokens of prompts and replies by API key.",
        [({"key": key}, count) for key, count in sorted(counts.key_tokens.items())],
    )
    page.metric(
        "histogram", "request_seconds", "From a request to its end.", [({}, counts.seconds)]
    )


def merged(pages: Mapping[str, str], counts: Counts) -> str:
    """The page of a controller: its own visits, and its workers' pages with their number as a label.

    A worker's count of visits is left out: the controller has counted them, by its clients' keys.
    """
    page = Page()
    _visits(page, counts)
    families: dict[str, list[str]] = {}
    for number, text in pages.items():
        name = ""
        for line in text.splitlines():
            if line.startswith("# "):
                name = line.split(" ")[2]
                head = families.setdefault(name, [])
                if line not in head:
                    head.append(line)
            elif "{" in line:
                families[name].append(line.replace("{", f'{{worker="{number}",', 1))
    own = ("herdbook_requests_total", "herdbook_request_seconds", "herdbook_key_")
    lines = [line for name, found in families.items() if not name.startswith(own) for line in found]
    return str(page) + "".join(line + "\n" for line in lines)
