"""Memory as the operating system counts it: the peak of a piece of work, and what is free."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Self


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
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes() -> int:
    """What this machine can still give without swapping."""
    about = Path("/proc/meminfo")
    if about.exists():
        for line in about.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
