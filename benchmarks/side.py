"""One contestant in a process of its own, so that its memory and its threads are its own.

The parent, with several sides open, asks them in turn; only the one that is asked works:

    with Side(__file__, "llamacpp") as peer:
        peer.ask("open", path="model.gguf")
        seconds = peer.ask("prefill", ids=[1, 2, 3])

The child is the same script with `--side NAME`; it answers by `serve(object)`, a method a question,
one JSON line each way. What libraries print goes to a log, whose end is shown when a side fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from record import THREADS


def environment() -> dict[str, str]:
    """The same threads for everybody, and nobody goes to the network."""
    count = str(THREADS)
    fixed = {name: count for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_OFFLINE": "1"}
    # An installed package has its bytecode, written by pip; ours, read in its folder, may write it.
    mine = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**mine, **fixed, **quiet}


class Side:
    """A running contestant."""

    def __init__(self, script: str, name: str) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", prefix="bench-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, script, "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(),
        )

    def ask(self, what: str, **settings: Any) -> Any:
        """The answer of the child's method `what`."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps([what, settings]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            raise SystemExit(
                f"{self.name} ended with code {self._process.returncode} at {what!r}; "
                f"its last words:\n{Path(self._log.name).read_text()[-4000:]}"
            )
        return json.loads(line)

    def close(self) -> None:
        """End the process that was started here."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream
            try:
                stream.close()
            except BrokenPipeError:  # a last question that the dead process never read
                continue
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(contestant: Any) -> None:
    """The child's life: questions from stdin, answers to what was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # C++ libraries print there too
    for line in sys.stdin:
        what, settings = json.loads(line)
        answers.write(json.dumps(getattr(contestant, what)(**settings)) + "\n")
        answers.flush()


def memory(key: str) -> int:
    """Bytes of this process by Linux's account: VmRSS is resident now, VmHWM the most ever.

    (A child's ru_maxrss begins at what its parent held, so it is of no use here.)
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {key} in /proc/self/status")


def data_folder() -> Path:
    """Real texts and rows, where there are any."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("HERDBOOK_DATA", beside))
