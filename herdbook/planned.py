"""`herd plan`: what a recipe's training, or one tuning, will take, before it runs.

Rows are the real ones: of the book where they are in it, else made in a book of a moment where that
needs no model. Only rows that a model would have to write first are assumed, as many as the step says
and as long as the others.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from herdbook import config
from herdbook.book.book import Artifact, Book
from herdbook.book.step import Step, named
from herdbook.data.user import Import
from herdbook.errors import ConfigError, UnknownName
from herdbook.model.checkpoint import expected_shapes, open_checkpoint
from herdbook.model.references import resolve
from herdbook.progress import Progress
from herdbook.recipe import Recipe, check
from herdbook.tokens.chat import Rendering
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import fitting, memory, methods, planning
from herdbook.training.classify import Classify
from herdbook.training.probe import Trial, packs_of, probe
from herdbook.training.rows import Rows, gather
from herdbook.training.tune import Tune


@dataclass(frozen=True)
class Planned:
    """What one tuning will take. Seconds and `trial` only after a trial."""

    step: str
    memory: planning.Memory
    room: int  # bytes that this machine can give
    disk: planning.Disk
    rows: int
    assumed_rows: int
    tokens: int
    steps: int
    seconds: float | None  # by the clock
    cpu_seconds: float | None  # of the processor, all threads
    trial: Trial | None

    def to_mapping(self) -> dict[str, Any]:
        plain = asdict(self)
        plain["memory"]["peak"] = self.peak
        return plain

    @property
    def peak(self) -> int:
        """Of the trial where there was one: it held all that the run will hold."""
        return self.memory.peak if self.trial is None else self.trial.peak


def plan_recipe(
    name: str, settings: Mapping[str, Any], book: Book, *, room: int | None, trial: bool
) -> list[Planned]:
    """The plans of a recipe's tunings; a CapacityError for the first that does not fit."""
    recipe = Recipe.read(name)
    steps = recipe.resolve(settings)
    check(steps)
    plans = []
    with tempfile.TemporaryDirectory(prefix="herdbook-plan-") as folder:
        scratch = Book(Path(folder))
        known = _known(recipe, steps, book, scratch)
        for called, step in steps.items():
            if isinstance(step, Tune) and not isinstance(step, Classify):
                root = _root(step.model, steps)
                if not root:
                    raise ConfigError(
                        f"recipe {name}",
                        rule="begins with a model from nothing, of which no plan is made yet",
                        next="plan its size with: herd plan pretrain --budget FLOPS",
                    )
                path = resolve(root, book)
                data = [known.get(one, steps[one]) for one in step.data]
                with named(step, called):
                    plans.append(_plan(called, step, path, data, book, room, trial))
    if not plans:
        raise ConfigError(
            f"recipe {name}", rule="has no step that trains", next="plan one with: herd plan train"
        )
    return plans


def plan_tune(
    settings: Mapping[str, Any], book: Book, *, room: int | None, trial: bool
) -> list[Planned]:
    """Of one tuning: settings as of a recipe's step Tune; data: files, or datasets of the book."""
    how = config.from_mapping(Tune, dict(settings), where="herd plan train")
    for name in ("model", "data"):
        if not getattr(how, name):
            raise ConfigError(
                f"--{name} is empty", rule="but a plan needs it", next=f"give --{name}"
            )
    with tempfile.TemporaryDirectory(prefix="herdbook-plan-") as folder, named(how, ""):
        how.check()
        scratch = Book(Path(folder))
        data = [_dataset(one, book, scratch) for one in how.data]
        return [_plan("train", how, resolve(how.model, book), data, book, room, trial)]


def _plan(
    called: str,
    how: Tune,
    path: Path,
    data: Sequence[Artifact | Step],
    book: Book,
    room: int | None,
    trial: bool,
) -> Planned:
    checkpoint = open_checkpoint(path)
    bench: Any = SimpleNamespace(
        inputs={"data": tuple(one for one in data if isinstance(one, Artifact))},
        artifact=lambda name: SimpleNamespace(path=path),
        book=book,
        progress=Progress(),
    )
    there = gather(how, bench, Tokenizer.load(path))[0] if bench.inputs["data"] else None
    rows, assumed = _all_rows(data, there, how.length)
    how = replace(  # no row is known, nor how many: the others are mixed
        how, mix=tuple(one for one, n in zip(how.mix, rows.sizes, strict=False) if n)
    )
    rows.sizes = [n for n in rows.sizes if n]
    load = fitting.fullest(rows, how)
    held = memory.held_bytes()
    room = held + memory.free_bytes() if room is None else room
    needed = planning.memory_of(checkpoint, how, load, held)
    fitting.refuse(checkpoint, how, load, needed, room)
    disk = planning.disk_of(checkpoint, how)
    fitting.need_disk(disk, book.home)
    decoder = planning.lay_out(checkpoint, how)
    methods.prepare(decoder, how)
    steps = packs_of(rows, how, decoder)
    tokens = sum(len(pack.ids) for packs in steps for pack in packs)
    found = seconds = cpu = None
    if trial:
        every = [pack for packs in steps for pack in packs]
        full = max(every, key=lambda one: len(one.ids))
        short = min(every, key=lambda one: abs(len(one.ids) - len(full.ids) // 3))
        found = probe(how, path, book.home, short, full, load.several)
        work = _Work(decoder, how)
        works = [[work(pack) for pack in one] for one in steps]
        sizes = work(short), work(full)
        seconds = seconds_of(found, *sizes, works)
        cpu = seconds_of(found, *sizes, works, clock="cpu")
    return Planned(
        step=called,
        memory=needed,
        room=room,
        disk=disk,
        rows=len(rows),
        assumed_rows=assumed,
        tokens=tokens,
        steps=len(steps),
        seconds=seconds,
        cpu_seconds=cpu,
        trial=found,
    )


def seconds_of(
    trial: Trial, short: float, full: float, steps: Sequence[Sequence[float]], clock: str = "wall"
) -> float:
    """Of a whole run: each pack costs something besides its work, and the trial's two say how much."""
    least, most = getattr(trial.short, clock), getattr(trial.full, clock)
    rate = max(0.0, most - least) / (full - short) if full > short else most / full
    besides = max(0.0, most - rate * full)
    packs = sum(besides + rate * one for packs in steps for one in packs)
    return float(packs + len(steps) * getattr(trial.step, clock))


class _Work:
    """A pack's arithmetic, in operations: matrices there and back, attention's half squares, the head
    for the tokens that are trained."""

    def __init__(self, decoder: Any, how: Tune) -> None:
        c = decoder.config
        shapes = expected_shapes(c)
        self.matrices = sum(
            math.prod(one)
            for name, one in shapes.items()
            if name.startswith("blocks.") and len(one) > 1
        )
        self.passes = (6 if how.method in methods.WEIGHTS else 4) + 2 * how.recomputes
        self.attention = 6 * c.layers * c.heads * c.head_dim
        self.head = c.vocab * c.hidden * (6 if how.method == "full" else 4)

    def __call__(self, pack: Any) -> float:
        squares = sum(one * one for one in pack.lengths)
        return float(
            self.passes * self.matrices * len(pack.ids)
            + self.attention * squares
            + self.head * sum(pack.mask)
        )


def _known(
    recipe: Recipe, steps: Mapping[str, Step], book: Book, scratch: Book
) -> dict[str, Artifact]:
    """Steps' results that are in the book, and the datasets that are made without a model."""
    known: dict[str, Artifact] = {}
    made: set[str] = set()  # in scratch, of which the book knows nothing
    for name, step in steps.items():
        if any(one not in known for one in _inputs(step)):
            continue
        written = step.with_inputs(lambda ref: known[ref].id)
        called = step.called() or f"{recipe.name}-{name}"
        new = made.intersection(_inputs(step))
        found = None if new else book.by_key(written.resolved(book).key())
        if found is None and step.kind == "dataset" and not _inputs(step):
            found = step.run(scratch, name=called)
            made.add(name)
        if found is not None:
            known[name] = found
    return known


def _inputs(step: Step) -> list[str]:
    named: list[str] = []
    for one in step.input_fields():
        value = getattr(step, one)
        named += value if isinstance(value, tuple) else [value] if value else []
    return named


def _root(ref: str, steps: Mapping[str, Step]) -> str:
    """What the step's model grows from: a model of the same shape."""
    for _ in steps:
        if ref in steps:
            ref = getattr(steps[ref], "model", "") or getattr(steps[ref], "ref", "")
    return ref


def _dataset(ref: str, book: Book, scratch: Book) -> Artifact:
    if Path(ref).expanduser().is_file():
        return Import(data=ref, heldout=0.0).run(scratch, name="rows")
    found = book.find(ref)
    if found is None or found.kind != "dataset":
        raise UnknownName(
            f"data {ref!r}",
            rule="is no file and no dataset in the book",
            next="herd list --kind dataset",
        )
    return found


class _Listed(list[Rendering]):
    """Rows, one dataset's after another's, and how many each has."""

    sizes: Sequence[int] = ()

    def counts(self) -> tuple[int, ...]:
        return tuple(self.sizes)


def _all_rows(
    data: Sequence[Artifact | Step], there: Rows | None, length: int
) -> tuple[_Listed, int]:
    """The rows of all datasets, and how many of them are assumed: those of a step that is still to run,
    as many as it says and as long as the others (else half of the most allowed)."""
    mean = round(float(there.sizes.mean())) if there else length // 2
    like = Rendering([0] * mean, [False] + [True] * (mean - 1))
    rows, sizes = _Listed(), []
    at = assumed = 0
    counts = iter(there.counts() if there else ())
    for one in data:
        if isinstance(one, Artifact):
            assert there is not None
            sizes.append(next(counts))
            rows += there[at : at + sizes[-1]]
            at += sizes[-1]
        else:
            sizes.append(int(getattr(one, "rows", 0)))
            rows += [like] * sizes[-1]
            assumed += sizes[-1]
    rows.sizes = sizes
    return rows, assumed
