"""make soak: a server under 64 clients for SOAK_SECONDS, some of them rude.

They stream or not, hang up at random, send bodies that are too large or no JSON, and prompts that do
not fit; they want logprobs, grammars, several choices, the best of some, embeddings, an adapter. In the
end every request was answered or refused, no page is held, and memory has not grown since the warm-up.
So for a model of float32, and for one of 4 bits that the native step computes, with an adapter that
PyTorch computes in bfloat16: there torch keeps a kernel for each shape, as many as `herd serve` lets it.
"""

from __future__ import annotations

import collections
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from herdbook.model.checkpoint import load_decoder, save_gguf
from herdbook.tokens.tokenizer import Tokenizer

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
WORKERS = int(os.environ.get("SOAK_WORKERS", "1"))
CLIENTS = 64
ADAPTER = "luna"
GROWTH_BYTES = 32 * 2**20  # after the warm-up; a leak of a kilobyte a request shows
START = (
    "import sys; from herdbook.serving.server import serve; "
    "serve(sys.argv[1:2], port=0, workers=int(sys.argv[2]), adapters={sys.argv[3]: sys.argv[4]})"
)


class Soak:
    def __init__(self, url: str, names: list[str]) -> None:
        self.port, self.names = int(url.rpartition(":")[2]), names
        self.end = time.monotonic() + SECONDS
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.strange: list[str] = []
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        dice = random.Random(number)
        while time.monotonic() < self.end:
            try:
                outcome = self.one(dice)
            except (OSError, http.client.HTTPException) as error:
                outcome = f"broken: {type(error).__name__}"
            with self._lock:
                self.outcomes[outcome] += 1

    def one(self, dice: random.Random) -> str:
        """One request; what became of it."""
        kind = dice.choice(
            ["stream", "stream", "whole", "leave", "leave", "large", "wrong", "long"]
        )
        if kind == "large":
            return self.large(dice)
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            path, body = self.ask(dice, kind)
            sent = json.dumps(body).encode()
            if kind == "wrong":
                sent = sent[: dice.randrange(len(sent))] + dice.choice([b"", b"\xff", b"[" * 999])
            line.request("POST", path, sent, {"Content-Type": "application/json"})
            if kind == "leave":
                time.sleep(dice.random() * 0.3)
                if dice.random() < 0.5 and line.sock is not None:
                    line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return "left"
            answer = line.getresponse()
            text = answer.read().decode()
        finally:
            line.close()
        expected = {"long": (400,), "wrong": (400,)}.get(kind, (200, 503))
        if answer.status not in expected or not self.whole(answer.status, text, body):
            with self._lock:
                self.strange.append(f"{kind}: {answer.status} {text[-300:]}")
        return f"{kind}: {answer.status}"

    def ask(self, dice: random.Random, kind: str) -> tuple[str, dict[str, Any]]:
        """(path, body) of a request that is right, but for one that is too long."""
        prompt = [dice.randrange(3, 280) for _ in range(dice.choice([1, 20, 200]))]
        if dice.random() < 0.5:  # prompts that begin alike
            prompt = [7] * 64 + prompt
        if kind == "long":
            prompt = [5] * 5000
        name = dice.choice(self.names)
        if kind in ("whole", "leave") and dice.random() < 0.2:
            return "/v1/embeddings", {"model": name, "input": [prompt, prompt[:5]]}
        body: dict[str, Any] = {
            "model": name,
            "prompt": prompt,
            "max_tokens": dice.choice([1, 8, 60]),
            "temperature": dice.choice([0, 1.0]),
            "n": dice.choice([1, 1, 2, 3]),
            "stream": kind in ("stream", "leave") and dice.random() < 0.8,
        }
        form = dice.choice(["free", "free", "free", "regex", "json"])
        if form == "free":
            body["ignore_eos"] = True
        elif form == "regex":
            body["guided_regex"] = f"[ab]{{{dice.randrange(1, 40)}}}"
        else:
            body["guided_json"] = {"enum": [dice.randrange(99), "yes", None]}
        if dice.random() < 0.3:
            body |= {"logprobs": dice.randrange(6), "echo": dice.random() < 0.5}
        elif not body["stream"] and dice.random() < 0.3:
            body["best_of"] = 3
        return "/v1/completions", body

    def large(self, dice: random.Random) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as line:
            announced = dice.random() < 0.5
            length = b"Content-Length: 99999999" if announced else b"Transfer-Encoding: chunked"
            head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            line.sendall(head + b"Content-Type: application/json\r\n" + length + b"\r\n\r\n")
            try:
                for _ in range(0 if announced else 70):
                    line.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                status = line.recv(65536).split(b" ")[1:2]
            except (BrokenPipeError, ConnectionResetError):  # it did not listen to the end
                return "large: cut off"
        if status != [b"413"]:
            self.strange.append(f"large: {status}")
        return "large: 413"

    @staticmethod
    def whole(status: int, text: str, body: Any) -> bool:
        if status == 200 and body.get("stream"):
            return text.endswith("data: [DONE]\n\n")
        told = "data" if "input" in body else "choices"
        return bool(json.loads(text)[told if status == 200 else "error"])


def resident_bytes(pid: int) -> int:
    """Of a process and its children."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert found
    return int(found[1]) * 1024 + sum(resident_bytes(int(child)) for child in children)


def metrics(port: int) -> dict[str, float]:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("GET", "/metrics")
    rows = line.getresponse().read().decode().splitlines()
    line.close()
    pairs = [row.rpartition(" ") for row in rows if not row.startswith("#")]
    return {name: float(value) for name, _, value in pairs}


@pytest.mark.parametrize("quantised", [False, True])
def test_soak(tiny_folder: Path, adapter: Path, tmp_path: Path, quantised: bool) -> None:
    env = {"HERDBOOK_HOME": os.devnull, **os.environ}
    model = tiny_folder
    if quantised:
        model, names = tmp_path / "tiny.gguf", ["tiny", "tiny", ADAPTER]
        env |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
        save_gguf(load_decoder(tiny_folder), Tokenizer.load(tiny_folder), model, "Q4_1")
    else:
        names = [model.name, model.name, ADAPTER]
        env["ATEN_CPU_CAPABILITY"] = "avx2"
    command = [sys.executable, "-u", "-c", START, str(model), str(WORKERS), ADAPTER, str(adapter)]
    file = tmp_path / "log"
    with file.open("w") as log, subprocess.Popen(command, stderr=log, env=env) as server:
        try:
            url = ""
            for _ in range(1200):
                if found := re.search(r"^ready: (\S+)", file.read_text(), re.MULTILINE):
                    url = found[1]
                    break
                time.sleep(0.1)
            soak = Soak(url, names)
            threads = [
                threading.Thread(target=soak.client, args=[number]) for number in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            sizes = []
            while time.monotonic() < soak.end:
                time.sleep(SECONDS / 12)
                sizes.append(resident_bytes(server.pid))
            for thread in threads:
                thread.join(SECONDS + 240)
            assert not any(thread.is_alive() for thread in threads), "a request hangs"
            time.sleep(3)
            found = metrics(soak.port)
            sizes.append(resident_bytes(server.pid))
        finally:
            server.terminate()
            server.wait(60)
    total = sum(soak.outcomes.values())
    print(f"\n{SECONDS:g} s, {total} requests, MB: {[size // 10**6 for size in sizes]}")
    for outcome, count in sorted(soak.outcomes.items()):
        print(f"  {count:7} {outcome}")
    held = {name: value for name, value in found.items() if "pages_used" in name}
    assert held and not any(held.values()), held
    idle = {name: value for name, value in found.items() if "open_requests" in name}
    assert idle and not any(idle.values()), idle
    assert not soak.strange, soak.strange[:5]
    assert not any(outcome.startswith("broken") for outcome in soak.outcomes)
    assert soak.outcomes["stream: 200"] and soak.outcomes["whole: 200"]
    warm, late = max(sizes[:4]), max(sizes[8:])
    assert late - warm < GROWTH_BYTES, "memory grows"
    assert server.returncode == 0
    assert "Traceback" not in file.read_text()
