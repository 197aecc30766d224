"""Workers on a Ray cluster behind the same door: one machine stands for many. `make ray` runs it."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from herdbook.errors import ServeError
from herdbook.serving.on_ray import connected, cores_each
from tests.serving.test_cluster import Cluster, loaded

START = (
    "import sys; from herdbook.serving.server import serve; "
    "serve(sys.argv[1:], port=0, workers=2, cluster=True, key='s3cret')"
)
HEAD = ["start", "--head", "--block", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
HEAD += ["--object-store-memory=80000000", "--disable-usage-stats"]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or not Path("/proc/self/task").exists(),
    reason="needs the extra `cluster`, and /proc to find the workers",
)


def descendants(pid: int, kind: str) -> list[int]:
    """The processes below this one whose command line says so."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        line = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has just ended
        return []
    below = [one for child in children for one in descendants(int(child), kind)]
    return [pid, *below] if kind in line else below


class Head:
    """A Ray cluster of this machine alone, closed to who does not know its token."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        told, log = folder / "ray_current_cluster", folder / "log"
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", *HEAD, f"--temp-dir={folder}"],
                stdout=out,
                stderr=out,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        for _ in range(600):
            if told.exists() and "Ray runtime started" in log.read_text():
                self.environment["RAY_ADDRESS"] = told.read_text()
                return
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    def members(self) -> list[int]:
        return descendants(self.process.pid, "herdbook.serving.member")

    def actors(self) -> list[int]:
        return descendants(self.process.pid, "ray::Replica")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: the paths of Ray's sockets are limited
    try:
        one = Head(folder)
        yield one
        one.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@needs_ray
def test_two_replicas_and_kill_9_in_the_middle_of_the_load(
    head: Head, tiny_folder: Path, tmp_path: Path
):
    openai = pytest.importorskip("openai")
    cluster = Cluster(tiny_folder, tmp_path / "log", START, **head.environment)
    try:
        url = f"http://127.0.0.1:{cluster.port}/v1"
        client = openai.OpenAI(base_url=url, api_key="s3cret", max_retries=0)
        ask = {"model": cluster.model, "messages": [{"role": "user", "content": "hi"}]}
        whole = client.chat.completions.create(**ask, max_tokens=8)
        stream = client.chat.completions.create(**ask, max_tokens=8, stream=True)
        parts = [part.choices[0].delta.content or "" for part in stream]
        assert len(parts) > 2 and "".join(parts) == whole.choices[0].message.content
        client.close()

        before = head.members()
        assert len(before) == 2
        replicas = cluster("/metrics")[1]
        assert 'worker="0"' in replicas and 'worker="1"' in replicas

        outcomes = loaded(cluster, lambda: os.kill(before[0], signal.SIGKILL))
        assert set(outcomes) <= {"whole", "stream", "told"}, outcomes
        assert outcomes["whole"] and outcomes["stream"]
        assert outcomes["told"] <= 4  # at most the streams that were under way
        cluster.until(lambda: cluster("/health")[1].count('"ready":true') == 2, 120)
        assert len(head.members()) == 2 and before[0] not in head.members()

        os.kill(head.actors()[0], signal.SIGKILL)  # its worker ends with it
        cluster.until(lambda: cluster("/health")[1].count('"ready":true') < 2)
        assert cluster.complete([5, 6, 7])[0] == 200
        cluster.until(lambda: cluster("/health")[1].count('"ready":true') == 2, 120)
        assert len(head.members()) == 2

        cluster.process.terminate()
        assert cluster.process.wait(60) == 0
        assert "Traceback" not in cluster.output
        cluster.until(lambda: not head.members() and not head.actors())
    finally:
        cluster.process.kill()
        cluster.process.wait(30)


@needs_ray
def test_no_cluster_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with (
        pytest.raises(ServeError, match=r"127.0.0.1:1 cannot be joined.*refused") as told,
        connected(1),
    ):
        pass
    assert "ray start --head" in told.value.next


def test_without_ray(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ServeError, match=re.escape("herdbook[cluster]")), connected(1):
        pass


def test_more_replicas_than_cores():
    assert cores_each([4, 2], 3) == 2
    with pytest.raises(ServeError, match=r"--workers 4 .* cores of Ray's cluster: 3"):
        cores_each([2, 1], 4)
