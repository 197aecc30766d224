"""`herd serve` in a process of its own, as clients meet it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai

START = (
    "import sys; from herdbook.serving.server import serve; serve(sys.argv[1:], port=0, key={key})"
)


class Server:
    """`serve(refs)` in a process of its own; a thread collects what it prints."""

    def __init__(self, *refs: str, key: str | None = None) -> None:
        command = [sys.executable, "-u", "-c", START.format(key=repr(key)), *refs]
        env = {"HERDBOOK_HOME": os.devnull, **os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.output, self.url = "", ""
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output += line
        self.process.stderr.close()

    def wait(self, timeout_s: float = 120) -> Server:
        """Until it says that it is ready, and where."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.process.poll() is None:
            if found := re.search(r"^ready: (http://\S+)", self.output, re.MULTILINE):
                self.url = found[1]
                return self
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.output}")

    def end(self, timeout_s: float = 60) -> tuple[int, str]:
        """(exit code, all that it printed) once it has ended by itself."""
        code = self.process.wait(timeout_s)
        self._reading.join(10)
        return code, self.output

    def stop(self) -> tuple[int, str]:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
            return json.load(answer)


def running(*refs: str, key: str | None = None) -> Iterator[Server]:
    server = Server(*refs, key=key)
    try:
        yield server.wait()
    finally:
        server.kill()
