"""Whether a tuning run fits this machine, and where not the nearest one that does.

Arithmetic alone, and where a bound by hand says that there is room in plenty, not even that: an
ordinary run does not notice. HERDBOOK_FIT=0 lets a run begin all the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herdbook.errors import CapacityError, ConfigError
from herdbook.model.checkpoint import Checkpoint, open_checkpoint
from herdbook.model.config import DecoderConfig
from herdbook.tokens.chat import Rendering
from herdbook.tokens.packing import pack
from herdbook.training import loop, memory
from herdbook.training import state as states
from herdbook.training.activations import Load
from herdbook.training.parallel import Team
from herdbook.training.planning import Disk, Memory, disk_of, memory_of

if TYPE_CHECKING:
    from herdbook.training.tune import Tune


def fullest(rows: Sequence[Rendering], how: Tune) -> Load:
    """The pack of the whole run that holds most tokens."""
    plan, sizes = how._plan(rows), loop.sizes_of(rows)
    cuts = list(loop.batches(plan, len(rows)))
    most = max(cuts, key=lambda cut: min(plan.pack, int(sizes[cut].sum())))
    packs, _ = pack([rows[n] for n in most], plan.pack)
    biggest = max(packs, key=lambda one: len(one.ids))
    several = any(sizes[cut].sum() > plan.pack for cut in cuts)
    return Load(tuple(biggest.lengths), sum(biggest.mask), several)


def need_room(
    how: Tune, path: Path, rows: Sequence[Rendering], work: Path, team: Team | None = None
) -> None:
    """Raise a CapacityError where memory or disk will not do, in every process of the team or in none.

    path: of the model; work: the folder of the run, on the disk that the result will lie on.
    """
    team = team or Team()
    if team.leads:
        states.clear(work)
    if os.environ.get("HERDBOOK_FIT") == "0":
        return
    checkpoint, load = open_checkpoint(path), fullest(rows, how)
    # the processes of a machine have its free memory together; none has loaded anything before all
    # have asked
    left = memory.free_bytes() // team.neighbours
    free, disk, held = team.least(left, shutil.disk_usage(work).free, -memory.held_bytes())
    held = -held
    bound = memory_of(checkpoint, how, load, held, rough=True, processes=team.size)
    if bound.peak - held > free // 2:
        needed = memory_of(checkpoint, how, load, held, processes=team.size)
        refuse(checkpoint, how, load, needed, held + free, team.size)
    need_disk(disk_of(checkpoint, how), work, disk, states.size(work))


def refuse(
    checkpoint: Checkpoint, how: Tune, load: Load, needed: Memory, room: int, processes: int = 1
) -> None:
    """Raise where `needed` is more than `room` bytes, with the nearest settings that fit."""
    if needed.peak <= room:
        return
    easier = nearest_fit(checkpoint, how, load, needed.process, room, processes)
    if easier is None:
        next = "take a smaller model or a machine with more memory"
    else:
        changed, its = easier
        flags = " ".join(f"--tune.{name} {_written(value)}" for name, value in changed.items())
        next = f"{flags}   (needs about {gigabytes(its.peak)})"
    raise CapacityError(
        f"this tuning needs about {gigabytes(needed.peak)} of memory ({parts(needed)})"
        + (f" in each of {processes} processes" if processes > 1 else ""),
        rule=f"and there are {gigabytes(room)}" + (" for each" if processes > 1 else ""),
        next=f"{next}; HERDBOOK_FIT=0 begins all the same",
    )


def need_disk(needed: Disk, place: Path, free: int | None = None, there: int = 0) -> None:
    """Raise where there is no room for it. there: bytes of the state that an earlier start left, which
    is one of the two that are counted."""
    free = shutil.disk_usage(place).free if free is None else free
    more = needed.total - min(there, needed.states // 2)
    if more > free:
        raise CapacityError(
            f"this tuning needs about {gigabytes(more)} of disk (result "
            f"{gigabytes(needed.result)}, states to go on from {gigabytes(needed.states)}"
            + (f", offloaded {gigabytes(needed.offloaded)})" if needed.offloaded else ")"),
            rule=f"and {place} has {gigabytes(free)}",
            next="free some space, or set HERDBOOK_HOME to a folder on a larger disk; "
            "HERDBOOK_FIT=0 begins all the same",
        )


def nearest_fit(
    checkpoint: Checkpoint, how: Tune, load: Load, process: int, room: int, processes: int = 1
) -> tuple[dict[str, Any], Memory] | None:
    """The mildest change of settings that fits: what changes, and its memory."""
    for changed in milder(how, max(load.lengths)):
        offload = changed.get("offload", ())
        if offload and processes > 1:  # refused by Tune
            continue
        if "base" in offload and type(checkpoint.config) is not DecoderConfig:  # by load_decoder
            continue
        easier = replace(how, **changed)
        try:
            easier.check()
        except ConfigError:
            continue
        smaller = load
        if (most := max(easier.pack, max(load.lengths))) < load.tokens:
            smaller = Load(*_some(load, most), several=True)
        needed = memory_of(checkpoint, easier, smaller, process, processes=processes)
        if needed.peak <= room:
            return changed, needed
    return None


def milder(how: Tune, longest: int) -> Iterator[dict[str, Any]]:
    """Changes of settings, from those that change nothing but speed to another method."""
    free: dict[str, Any] = {} if how.recomputes else {"recompute": True}
    short = {"pack": how.length} if how.pack > how.length else {}
    yield from (one for one in (free, short, free | short) if one)
    if how.method in ("full", "freeze"):
        off = {} if how.offload else {"offload": ("optimiser",)}
        yield from (one for one in (off, off | free, off | free | short) if one)
        few = {"optimiser": "adamw8"} if how.optimiser == "adamw" else {}
        narrow = {"precision": "bfloat16"} if how.method == "full" else {}
        yield from (
            one for one in (few, free | few, free | short | few, free | short | few | narrow) if one
        )
        empty = {"method": "lora", "precision": "float32", "parts": (), "last_layers": 0}
        change = {name: value for name, value in empty.items() if getattr(how, name) != value}
        yield from (change, change | free, change | free | short)
        streamed = {"offload": (*how.offload, "base")}
        yield from (change | short | one for one in (streamed, free | {"base": "nf4"}))
    elif how.method in ("lora", "ia3", "prefix", "prompt") and how.base == "dense":
        for way in ({"base": "packaged"}, {"offload": (*how.offload, "base")}, {"base": "nf4"}):
            yield from (way, way | free, way | free | short)


def _some(load: Load, most: int) -> tuple[tuple[int, ...], int]:
    """The documents of a pack that a smaller one would hold, and its trained tokens."""
    kept: list[int] = []
    for length in sorted(load.lengths, reverse=True):
        if sum(kept) + length <= most:
            kept.append(length)
    return tuple(kept), load.trained * sum(kept) // load.tokens


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def parts(needed: Memory) -> str:
    shown = [(one.name, getattr(needed, one.name)) for one in fields(needed)]
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in shown if size >= 1e6)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        value = ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value or '""')
