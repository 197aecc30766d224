"""native.cpp, compiled on first use for the processor at hand, and kept.

HERDBOOK_NATIVE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from herdbook.model.references import cache as fetched

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = (SOURCE, SOURCE.with_name("vector.h"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC")

log = logging.getLogger("herdbook.engine")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, from the cache or built now; None where this machine cannot have it.

    Why not is said once, as a warning: without it the engine is right but several times slower.
    """
    if os.environ.get("HERDBOOK_NATIVE") == "0":
        return None
    try:
        return _library()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = str(error)
        if isinstance(error, subprocess.CalledProcessError):
            said = error.stderr.decode(errors="replace").strip().splitlines()
            reason = f"{error.cmd[0]} failed: {said[0] if said else error}"
        log.warning("the engine computes by PyTorch, slower than it could: %s", reason)
        return None


def _library() -> ctypes.CDLL:
    if "avx2" not in processor():
        raise RuntimeError("this processor has no AVX2")
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (install g++, or name one in CXX)")
    found = importlib.util.find_spec("torch")  # which is not imported
    folder = Path(found.origin).parent / "lib" if found and found.origin else Path()
    omp = next(iter(sorted(folder.glob("libgomp*.so*"))), None)
    if omp is None:
        raise RuntimeError("PyTorch came without its OpenMP library (libgomp)")
    # threads are shared with torch, should it come: its OpenMP is made visible, and none is linked
    ctypes.CDLL(str(omp), mode=ctypes.RTLD_GLOBAL)
    made = ctypes.CDLL(str(_built(compiler)))
    made.herd_scratch.restype = ctypes.c_int64
    return made


def _built(compiler: str) -> Path:
    """The shared object for this source, compiler and processor."""
    about = os.stat(compiler)
    version = f"{os.path.realpath(compiler)} {about.st_size} {about.st_mtime_ns} {FLAGS}"
    key = hashlib.sha256(
        b"".join(one.read_bytes() for one in SOURCES) + (version + processor()).encode()
    ).hexdigest()[:16]
    target = fetched() / "native" / f"step-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            made = Path(work) / "step.o"
            run = functools.partial(subprocess.run, check=True, capture_output=True)
            run([compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(made)])
            run([compiler, "-shared", str(made), "-o", str(made.with_suffix(".so"))])
            os.replace(made.with_suffix(".so"), target)
    return target


@functools.cache
def processor() -> str:
    """Its name and what it can do, in the words of Linux; empty where nobody tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    told = (line for line in text.splitlines() if line.startswith(("flags", "model name")))
    return "\n".join(dict.fromkeys(told))


def threads() -> int:
    """How many compute at once: as many as torch takes, where it is there, else all cores that this
    process may use (OMP_NUM_THREADS)."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(given)) if given.isdigit() else cores()


@functools.cache
def cores() -> int:
    """Physical ones of those that this process may use: their twins only get in the way."""
    mine = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    found = set()
    for one in mine:
        about = Path(f"/sys/devices/system/cpu/cpu{one}/topology/thread_siblings_list")
        found.add(about.read_text() if about.is_file() else str(one))
    return max(1, len(found))
