"""Memory as the operating system counts it: the peak of a piece of work, and what is free.

A container's limit counts: with 64 GB in the machine and a control group of 8, 8 can be had.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

#: a control group's files, in version 2
V2 = ("memory.max", "memory.current")


class Peak:
    """The most memory this process held inside the block: resident bytes, everything included.

    with Peak() as peak: train()
    print(peak.bytes)

    Linux lets a process reset its high-water mark; elsewhere the mark of its whole life is given.
    """

    bytes: int = 0

    def __enter__(self) -> Self:
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bytes = peak_bytes()


def peak_bytes() -> int:
    """High-water mark of this process's resident memory.

    Linux: VmHWM, since ru_maxrss of a child begins at what its parent held at the fork.
    """
    if (found := _own("VmHWM")) is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes() -> int:
    """Resident memory of this process now (elsewhere than on Linux: its high-water mark)."""
    found = _own("VmRSS")
    return peak_bytes() if found is None else found


def _own(key: str) -> int | None:
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def free_bytes(root: Path = Path("/")) -> int:
    """What this process can still take without swapping, or being killed: of the machine's memory, and
    of every control group that it is in. root: where proc and sys are mounted."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    about = root / "proc/meminfo"
    if about.exists():
        for line in about.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) * 1024
    return max(0, min([found, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> list[int]:
    """What each limited control group has left; files that it only caches do not count as used."""
    groups = root / "proc/self/cgroup"
    left = []
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, name = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else V2
        place = base / name.strip("/")
        while place.is_relative_to(base):
            limit, used = (_number(place / one) for one in names)
            if limit is not None and used is not None:
                left.append(limit - used + _cached(place / "memory.stat"))
            place = place.parent
    return left


def _number(file: Path) -> int | None:
    text = file.read_text().strip() if file.is_file() else "max"
    return int(text) if text.isdigit() else None


def _cached(stat: Path) -> int:
    lines = stat.read_text().splitlines() if stat.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
