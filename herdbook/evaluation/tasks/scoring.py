"""Asks a model a task's items, in batches, and gives a row of results for each.

    {"id", "group", "values": {"acc": 1.0}, "choice": 2, "right": [2], "logprobs": [-3.1, …]}
    {"id", "group", "values": {"number": null}, "why": {"number": "no number after ####"}, "reply"}
    {"id", "values": {}, "nll": 713.2, "tokens": 1024, "bytes": 4410}         a window of a text

**Likelihoods.** A choice's tokens are those that encode(context + choice) has after encode(context);
blanks at the context's end are the choice's (as in lm-evaluation-harness). What choices, questions
and groups have in common is computed once (engine/score.py).

**The same whatever ran before.** Items are asked in an order that their texts alone decide, in batches
of a fixed size, each with an empty cache: so neither the file's order nor a kill in between changes
one bit. With other batches (another limit, another machine) the native engine still gives the same
bits; PyTorch takes sums in another order, and log-likelihoods may differ by rounding (below 1e-4 nats a
token in float32).

**Too long.** Where the examples leave no room, the last ones are left out; how many stayed stands in
the row. A question that is too long even alone is unparsed, and says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from herdbook.engine.loaded import LoadedModel
from herdbook.engine.request import Request, Sampling
from herdbook.errors import DataError
from herdbook.evaluation.marks import scorers
from herdbook.evaluation.marks.scorers import POOLED
from herdbook.evaluation.tasks import choices
from herdbook.evaluation.tasks.task import JUDGED_METRICS, Item, Task

#: items asked at once: choices and windows, replies
SCORED, GENERATED = 256, 64


@dataclass(frozen=True)
class Window:
    """A piece of a text: its tokens, those it sees before them, and how much text it is."""

    id: str
    before: list[int]
    ids: list[int]
    bytes: int


def batches(
    model: LoadedModel, task: Task, items: Sequence[Item], limit: int = 0
) -> list[list[Any]]:
    """The items (of a text: its windows) in the order and the portions in which they are asked."""
    work: list[Any]
    if task.kind == "text":
        work = [one for item in items for one in windows(model, item, task.window)]
        if 0 < limit < len(work):
            work = [work[place * len(work) // limit] for place in range(limit)]
    else:
        work = sorted(items, key=lambda item: (item.context(), item.id))
    size = GENERATED if task.kind == "generate" else SCORED
    return [work[start : start + size] for start in range(0, len(work), size)]


def run(
    model: LoadedModel, task: Task, batch: Sequence[Any], *, seed: int = 0, chat: bool = False
) -> list[dict[str, Any]]:
    """The rows of one batch, in its order."""
    model.engine.forget()
    if task.kind == "text":
        return _texts(model, batch)
    ask = _Chat(model) if chat else _Plain(model)
    return _scored(ask, task, batch) if task.kind == "choice" else _said(ask, task, batch, seed)


class _Plain:
    """The items as texts to go on with."""

    trim = False

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.stop: tuple[str, ...] = ()

    def ids(self, item: Item, shots: int) -> list[int]:
        return self.model.tokenizer.prompt(self.model.written(item.context(shots)))

    def choices(self, item: Item, shots: int) -> tuple[list[int], list[list[int]]]:
        texts = [item.delimiter + one for one in item.choices]
        return split(self.model, item.context(shots), texts)


class _Chat:
    """The items as a user's turn, by the model's own template; the answer is the assistant's."""

    trim = True

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.stop = model.tokenizer.stop_strings

    def ids(self, item: Item, shots: int) -> list[int]:
        return self.model.render([_user(item, shots)], reply=True).ids

    def choices(self, item: Item, shots: int) -> tuple[list[int], list[list[int]]]:
        context, found = self.ids(item, shots), []
        for one in item.choices:
            said = one.strip()
            whole = self.model.render([_user(item, shots), {"role": "assistant", "content": said}])
            if whole.ids[: len(context)] == context:
                found.append(self._until(whole.ids[len(context) :], said))
            else:  # the template writes a turn that waits otherwise than one that is there
                found.append(self.model.tokenizer.encode(said))
        return context, found

    def _until(self, ids: list[int], said: str) -> list[int]:
        """The ids that write `said`, without what ends the turn."""
        for end in range(1, len(ids) + 1):
            if self.model.tokenizer.decode(ids[:end]).strip().startswith(said):
                return ids[:end]
        return ids


def split(
    model: LoadedModel, context: str, several: Sequence[str], *, chat: bool = False
) -> tuple[list[int], list[list[int]]]:
    """The ids of a context, and those of each text that may follow it.

    chat: the context was written by a chat template, whose special tokens are such.
    """
    encode = partial(model.tokenizer.encode, specials=True) if chat else model.tokenizer.encode
    if not chat:
        context, several = model.written(context), [model.written(one) for one in several]
    bare = context.rstrip()
    ids = encode(bare)
    found = [encode(context + one)[len(ids) :] for one in several]
    if model.model.whole_prompts or not all(found):
        # read and written are two texts, or one token holds the end of the one and the other
        found = [encode(one.strip()) for one in several]
    return ids if chat else model.tokenizer.prompt(bare), found


def _user(item: Item, shots: int) -> dict[str, str]:
    return {"role": "user", "content": item.context(shots).strip()}


def _scored(ask: _Plain | _Chat, task: Task, batch: Sequence[Item]) -> list[dict[str, Any]]:
    most = ask.model.engine.most_tokens
    asked: list[tuple[int, list[int], list[list[int]]]] = []
    rows = [_row(item) for item in batch]
    for place, item in enumerate(batch):
        for shots in range(len(item.shots), -1, -1):
            ids, several = ask.choices(item, shots)
            if len(ids) + max(map(len, several)) <= most:
                asked.append((place, ids, several))
                rows[place] |= {"shots": shots} if shots < len(item.shots) else {}
                break
        else:
            rows[place] |= _too_long(task, len(ids), most)
    scores = ask.model.engine.score_many([(ids, several) for _, ids, several in asked])
    for (place, _, _), found in zip(asked, scores, strict=True):
        item, logprobs = batch[place], [one.total for one in found]
        values = {
            metric: choices.worth(metric, logprobs, item.choices, item.right)
            for metric in task.metrics
        }
        told = {"choice": logprobs.index(max(logprobs)), "right": list(item.right)}
        rows[place] |= {"values": values, **told, "logprobs": logprobs}
    return rows


def _said(
    ask: _Plain | _Chat, task: Task, batch: Sequence[Item], seed: int
) -> list[dict[str, Any]]:
    most = ask.model.engine.most_tokens - 1
    rows = [_row(item) for item in batch]
    requests: dict[int, Request] = {}
    for place, item in enumerate(batch):
        for shots in range(len(item.shots), -1, -1):
            ids = ask.ids(item, shots)
            if len(ids) + min(task.max_tokens, most // 2) <= most:  # room for a reply
                sampling = Sampling(
                    max_tokens=task.max_tokens,
                    temperature=task.temperature,
                    seed=_seed(seed, item.id),
                    stop=task.stop,
                )
                requests[place] = Request(ids, sampling, stop=ask.stop, trim=ask.trim)
                rows[place] |= {"shots": shots} if shots < len(item.shots) else {}
                break
        else:
            rows[place] |= marked(task, [item], [""])[0] | _too_long(task, len(ids), most)
    replies = ask.model.engine.generate(list(requests.values()))
    texts = [reply.text for reply in replies]
    marks = marked(task, [batch[place] for place in requests], texts)
    for place, reply, found in zip(requests, replies, marks, strict=True):
        rows[place] |= {"reply": reply.text, "tokens": reply.completion_tokens} | found
    return rows


def marked(task: Task, items: Sequence[Item], replies: Sequence[str]) -> list[dict[str, Any]]:
    """What the task's scorers give for each reply; a judge's metrics are added later (judged.py)."""
    metrics = [metric for metric in task.metrics if metric not in JUDGED_METRICS]
    columns = {metric: scorers.marked(metric, items, replies) for metric in metrics}
    rows: list[dict[str, Any]] = []
    for place in range(len(items)):
        marks = {metric: column[place] for metric, column in columns.items()}
        row: dict[str, Any] = {"values": {name: one.value for name, one in marks.items()}}
        if why := {name: one.why for name, one in marks.items() if one.why}:
            row["why"] = why
        if counts := {name: one.counts for name, one in marks.items() if name in POOLED}:
            row["counts"] = counts
        rows.append(row)
    return rows


def _row(item: Item) -> dict[str, Any]:
    return {"id": item.id} | ({"group": item.group} if item.group else {})


def _too_long(task: Task, tokens: int, most: int) -> dict[str, Any]:
    why = f"{tokens} tokens where the model takes {most}"
    return {"values": dict.fromkeys(task.metrics), "why": dict.fromkeys(task.metrics, why)}


def _seed(seed: int, id: str) -> int:
    """Of one draw: other questions and other seeds have others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode()).digest()[:7])


# ------------------------------------------------------------------------------------------- texts


def windows(model: LoadedModel, item: Item, most: int) -> Iterator[Window]:
    """A text in pieces of `most` tokens, each token in one. Each piece sees the token before it, the
    first one the BOS (or, where there is none, the end of a document), and the last, which is shorter,
    as many as make it `most`: lm-evaluation-harness's rolling windows."""
    ids = model.tokenizer.encode(model.written(item.prompt))
    most = min(most, model.engine.most_tokens - 1)
    assert most > 0
    sizes = [len(model.tokenizer.token_bytes(id)) for id in ids]
    left = len(item.prompt.encode()) - sum(sizes)  # what a tokenizer adds or lacks: a first blank
    edges = [*range(0, len(ids), most), len(ids)]
    for number, (start, end) in enumerate(pairwise(edges)):
        before = ids[max(0, end - most - 1) : start] if start else [first_token(model)]
        size = sum(sizes[start:end]) + (0 if start else left)
        yield Window(f"{item.id}.{number + 1}", before, ids[start:end], size)


def first_token(model: LoadedModel) -> int:
    """What stands before a text, so that its first token can be scored."""
    tokenizer = model.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise DataError(
            "a model without BOS and EOS",
            rule="cannot score a text's first token",
            next="give its tokenizer's configuration one of them",
        )
    return first


def _texts(model: LoadedModel, batch: Sequence[Window]) -> list[dict[str, Any]]:
    scores = model.engine.score_many([(one.before, [one.ids]) for one in batch])
    return [
        {
            "id": one.id,
            "values": {},
            "nll": -score.total,
            "tokens": score.tokens,
            "bytes": one.bytes,
        }
        for one, (score,) in zip(batch, scores, strict=True)
    ]
