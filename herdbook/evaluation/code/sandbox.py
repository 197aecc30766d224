"""Model-written code runs shut in, or not at all.

`Sandbox` starts a Python program without network, files of others, environment or rights, under
limits (see `confine.py` for what the kernel does). Where the kernel does not permit that, it raises
`SandboxError`: there is no way to run the code unconfined.

It rests on the Linux kernel: who breaks the kernel breaks out. For code of people who would do that,
use a virtual machine.
"""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from herdbook.errors import SandboxError

#: time for two interpreters to start on a machine that is busy
STARTING_S = 30.0
_SCRIPT = Path(__file__).with_name("confine.py")


@dataclass(frozen=True)
class Limits:
    """Of one program, all its processes together where the kernel can count them so."""

    seconds: float = 3.0  # by the clock, while it works
    memory_bytes: int = 512 << 20  # of each process
    disk_bytes: int = 16 << 20  # all that it may write, which is in memory
    processes: int = 4  # and threads
    output_bytes: int = 1 << 20

    def to_json(self) -> dict[str, int]:
        return {
            "AS": self.memory_bytes,
            "CPU": int(self.seconds) + 2,
            "FSIZE": self.disk_bytes,
            "NOFILE": 64,
            "NPROC": self.processes + 2,  # the two that shut it in
            "disk": self.disk_bytes,
        }


class Sandbox:
    """A Python program that runs shut in; leaving the `with` ends it and all that it started.

    `source` is the program, `arguments` its sys.argv[1:]. It has the standard library and nothing
    else. `stdin` and `stdout` are file descriptors, `keep` further ones that it inherits. Dictionaries
    iterate alike in every run: the hash seed is 0.
    """

    def __init__(
        self,
        source: str,
        arguments: Sequence[str] = (),
        *,
        limits: Limits,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        keep: Sequence[int] = (),
    ) -> None:
        if sys.platform != "linux":
            raise _refused(f"{sys.platform} has no namespaces")
        self._root = tempfile.mkdtemp(prefix="herd-sandbox-")
        told, status = os.pipe()
        python = os.path.realpath(sys.executable)
        plan = {
            "root": self._root,
            "paths": _paths(),
            "status": status,
            "limits": limits.to_json(),
            "command": [python, "-s", "-S", "-B", "-P", "-c", source, *arguments],
            "environment": {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        }
        try:
            self._process = subprocess.Popen(
                [python, "-I", "-S", "-B", str(_SCRIPT), json.dumps(plan)],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                pass_fds=(status, *keep),
                start_new_session=True,
            )
        except OSError as error:
            os.close(told)
            os.rmdir(self._root)
            raise _refused(f"a process could not be started: {error}") from None
        finally:
            os.close(status)
        try:
            said = read_all(told, 4096, STARTING_S)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(told)
        if said != b"ok":
            self.close()
            why = "it did not start in time" if said is None else said.decode(errors="replace")
            raise _refused(why.removeprefix("ok") or "it ended at once")

    def close(self) -> None:
        """End the program, its children too."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def read_all(source: int, most: int, seconds: float) -> bytes | None:
    """What comes until the other side closes, at most `most` bytes; None: it takes too long."""
    found, deadline = bytearray(), time.monotonic() + seconds
    while len(found) < most:
        if not select.select([source], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        part = os.read(source, min(65536, most - len(found)))
        if not part:
            break
        found += part
    return bytes(found)


@functools.cache
def _paths() -> list[str]:
    """What a Python needs of the file system; a folder that lies in another is not named."""
    prefix = os.path.realpath(sys.base_prefix)
    if prefix == "/":
        raise _refused("Python lies in /, so all files would have to be shown")
    wanted = [prefix, "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    return [
        path
        for path in dict.fromkeys(wanted)
        if os.path.lexists(path) and not (path != prefix and path.startswith(prefix + "/"))
    ]


def _refused(why: str) -> SandboxError:
    return SandboxError(
        f"code cannot be shut in here ({why})",
        rule="and model-written code is never run unconfined",
        next="use Linux ≥ 5.12 with user namespaces (sysctl user.max_user_namespaces, "
        "kernel.apparmor_restrict_unprivileged_userns=0), or root; in Docker: "
        "--security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN",
    )
