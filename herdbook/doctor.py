"""`herd doctor`: what this machine has, and what Herdbook will use of it."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from herdbook import versions
from herdbook.book.tree import human_bytes

#: instruction sets that decide how fast it goes, by the kernel's name for them
INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "i8mm",
    "bf16",
)


def _cpu() -> tuple[str, list[str]]:
    """Its name and its instruction sets, as far as the system tells (Linux)."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key in ("flags", "Features"):
                flags.update(value.split())
    return name, [one for one in INSTRUCTION_SETS if one in flags]


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return f"{human_bytes(total)}, {human_bytes(free)} free"


def examine() -> dict[str, str]:
    """Finding → what it is, in the order in which a person would ask."""
    import torch

    from herdbook.book.book import Book
    from herdbook.model.precision import compute_dtype

    book = Book()
    name, sets = _cpu()
    gpu = (
        ", ".join(torch.cuda.get_device_name(one) for one in range(torch.cuda.device_count()))
        if torch.cuda.is_available()
        else "none; not needed"
    )
    dtype = str(compute_dtype()).removeprefix("torch.")
    found = {
        "processor": name,
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "instruction sets": ", ".join(sets) or "none that matter here",
        "memory": _memory(),
        "gpu": gpu,
        "computes in": f"{dtype}"
        + ("" if dtype == "bfloat16" else " (this processor does not multiply bfloat16)"),
        "compiler": shutil.which("c++") or "none; not needed",
        "book": f"{book.home}, {len(book.entries())} entries, "
        f"{human_bytes(shutil.disk_usage(book.home).free)} free on its disk",
    }
    found |= {f"version of {key}": value for key, value in versions.all().items()}
    return found
