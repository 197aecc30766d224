"""Several worker processes behind one door: shared load, a worker that is killed, a clean end."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

START = (
    "import sys; from herdbook.serving.server import serve; "
    "serve(sys.argv[1:2], port=0, workers=2, key='s3cret', adapters=dict([sys.argv[2:]]))"
)


class Cluster:
    def __init__(
        self,
        folder: Path,
        log: Path,
        start: str = START,
        adapter: Path | None = None,
        **environment: str,
    ) -> None:
        self.model, self.log = folder.name, log
        env = {"HERDBOOK_HOME": os.devnull, **os.environ, **environment}
        with log.open("w") as out:
            luna = [] if adapter is None else ["luna", str(adapter)]
            command = [sys.executable, "-u", "-c", start, str(folder), *luna]
            self.process = subprocess.Popen(command, stderr=out, env=env)
        for _ in range(1200):
            if found := re.search(r"^ready: http://127.0.0.1:(\d+)", self.output, re.MULTILINE):
                self.port = int(found[1])
                return
            assert self.process.poll() is None, self.output
            time.sleep(0.1)
        raise AssertionError(self.output)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def __call__(self, path: str, body: Any = None, key: str = "s3cret") -> tuple[int, str]:
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        method = "GET" if body is None else "POST"
        line.request(method, path, None if body is None else json.dumps(body), headers)
        answer = line.getresponse()
        text = answer.read().decode()
        line.close()
        return answer.status, text

    def complete(self, prompt: list[int], **keys: Any) -> tuple[int, str]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
        return self("/v1/completions", body | keys)

    def until(self, true: Any, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.output
            time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(
    tiny_folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    if not Path("/proc/self/task").exists():
        pytest.skip("the workers are found in /proc")
    one = Cluster(tiny_folder, tmp_path_factory.mktemp("cluster") / "log", adapter=adapter)
    yield one
    one.process.kill()
    one.process.wait(30)


def test_replies_errors_and_usage_come_through(cluster: Cluster):
    status, text = cluster.complete([5, 6, 7])
    whole = json.loads(text)
    assert status == 200 and whole["usage"]["completion_tokens"] == 8
    status, text = cluster.complete([5, 6, 7], stream=True)
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "") and ": usage" not in text
    parts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert "".join(parts) == whole["choices"][0]["text"]
    assert cluster.complete([5] * 600)[0] == 400
    assert cluster("/v1/models", key="wrong")[0] == 401
    assert json.loads(cluster("/v1/models")[1])["data"][0]["id"] == cluster.model
    assert cluster("/nothing")[0] == 404
    cluster.until(lambda: cluster.output.count("key=server in=3 out=8") == 2)


def test_forms_tools_adapters_and_embeddings_come_through(cluster: Cluster):
    status, text = cluster.complete([5], guided_grammar='start: "a"{5,5}', ignore_eos=False)
    assert status == 200 and json.loads(text)["choices"][0]["text"] == "aaaaa"
    wrong = {"guided_grammar": "start: (((", "ignore_eos": False, "stream": True}
    status, text = cluster.complete([5], **wrong)
    assert status == 400 and "grammar cannot be used" in text
    call = {"type": "function", "function": {"name": "now"}}
    body = {"model": "luna", "messages": [{"role": "user", "content": "Hi"}], "tools": [call]}
    body |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
    status, text = cluster("/v1/chat/completions", body)
    (made,) = json.loads(text)["choices"][0]["message"]["tool_calls"]
    assert made["function"] == {"name": "now", "arguments": "{}"}
    told = []
    for name in (cluster.model, "luna"):
        choice = json.loads(cluster.complete([5, 6], model=name, logprobs=1, echo=True)[1])
        told.append(choice["choices"][0]["logprobs"]["token_logprobs"])
    assert len(told[0]) == len(told[1]) == 10 and told[0] != told[1]
    status, text = cluster("/v1/embeddings", {"model": "luna", "input": [5, 6, 7]})
    assert status == 200 and len(json.loads(text)["data"][0]["embedding"]) == 64
    cluster.until(lambda: "model=luna key=server in=3 out=0" in cluster.output)
    assert 'herdbook_requests_total{model="luna",outcome="ok"} 3' in cluster("/metrics")[1]


def test_both_work_and_prompts_that_begin_alike_share_one(cluster: Cluster):
    prefix = list(range(10, 200))
    for last in range(6):
        cached = json.loads(cluster.complete([*prefix, last])[1])["usage"]["prompt_tokens_details"]
        assert bool(cached["cached_tokens"]) == (last > 0)
    threads = [
        threading.Thread(target=cluster.complete, args=[[at + 3] * 40], kwargs={"max_tokens": 60})
        for at in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    page = cluster("/metrics")[1]
    for number in (0, 1):
        label = f'worker="{number}",model="{cluster.model}"'
        found = re.search(rf"completion_tokens_total\{{{label}\}} (\d+)", page)
        assert found and int(found[1]) > 0
        assert f"herdbook_pages_used{{{label}}} 0" in page


def loaded(cluster: Cluster, blow: Callable[[], None]) -> Counter[str]:
    """How the requests of 8 clients end, half of them streams, with a blow in the middle."""
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()
    end = time.monotonic() + 6

    def client(number: int) -> None:
        turn = 0
        while time.monotonic() < end:
            turn += 1
            stream = number % 2 == 0
            prompt = [number + 3, turn % 300 + 3] * 10
            status, text = cluster.complete(prompt, stream=stream, max_tokens=100)
            if stream and status == 200 and "worker_died" in text:
                outcome = "told" if '"error"' in text and "[DONE]" not in text else "wrong"
            elif stream:
                outcome = "stream" if text.endswith("data: [DONE]\n\n") else f"cut {status}"
            else:
                done = status == 200 and json.loads(text)["usage"]["completion_tokens"] == 100
                outcome = "whole" if done else f"refused {status} {text}"
            with lock:
                outcomes[outcome] += 1

    threads = [threading.Thread(target=client, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    blow()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads)
    return outcomes


def test_kill_9_in_the_middle_of_the_load(cluster: Cluster):
    """Whole replies all come, from the other worker; streams end whole or with an error that says so."""
    before = cluster.workers()
    outcomes = loaded(cluster, lambda: os.kill(before[0], signal.SIGKILL))
    assert set(outcomes) <= {"whole", "stream", "told"}, outcomes
    assert outcomes["whole"] and outcomes["stream"]
    assert outcomes["told"] <= 4  # at most the streams that were under way

    cluster.until(lambda: len(cluster.workers()) == 2 and set(cluster.workers()) != set(before))
    cluster.until(lambda: all(one["ready"] for one in json.loads(cluster("/health")[1])["workers"]))
    assert all(not one["open_requests"] for one in json.loads(cluster("/health")[1])["workers"])


def test_a_clean_end(cluster: Cluster):
    workers = cluster.workers()
    cluster.process.terminate()
    assert cluster.process.wait(60) == 0
    assert "Traceback" not in cluster.output
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_workers_do_not_outlive_a_killed_controller(
    tiny_folder: Path, adapter: Path, tmp_path: Path
):
    cluster = Cluster(tiny_folder, tmp_path / "log", adapter=adapter)
    workers = cluster.workers()
    assert len(workers) == 2
    cluster.process.kill()
    cluster.process.wait(30)
    cluster.until(lambda: not any(_lives(pid) for pid in workers), seconds=20)


def test_a_worker_answers_on_its_address_to_who_knows_the_secret(tiny_folder: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "herdbook.serving.member"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    told = {"refs": [str(tiny_folder)], "secret": "w0rd", "host": "127.0.0.2"}
    process.stdin.write(json.dumps(told).encode() + b"\n")
    process.stdin.flush()
    port = int(process.stdout.readline())

    def status(host: str, **headers: str) -> int:
        line = http.client.HTTPConnection(host, port, timeout=60)
        line.request("GET", "/v1/models", headers=headers)
        found = line.getresponse().status
        line.close()
        return found

    assert status("127.0.0.2") == 401
    assert status("127.0.0.2", Authorization="Bearer other") == 401
    assert status("127.0.0.2", Authorization="Bearer w0rd") == 200
    with pytest.raises(ConnectionRefusedError):
        status("127.0.0.1", Authorization="Bearer w0rd")
    process.stdin.close()
    assert process.wait(30) == 1
    process.stdout.close()


def _lives(pid: int) -> bool:
    """A zombie, which nobody here may reap, does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
