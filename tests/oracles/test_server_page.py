"""docs/server.md: its examples against a running server, its limits against the code."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from herdbook import cli
from herdbook.engine.grammar import MOST_BYTES, MOST_DEPTH
from herdbook.engine.request import MOST_LOGPROBS
from herdbook.serving import embeddings, guard, messages, schema, tools, worker
from tests.documents import ROOT, blocks, commands
from tests.oracles.servers import Server, running

PAGES = ("docs/server.md", "docs/server.zh.md")
HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERDBOOK_HOME", str(tmp_path_factory.mktemp("home")))
        yield from running("smollm2")


@pytest.mark.parametrize("page", PAGES)
def test_the_python_runs(server: Server, page: str, tmp_path: Path) -> None:
    (block,) = blocks(page, "python")
    assert HERE in block
    script = tmp_path / "block.py"
    script.write_text(block.replace(HERE, server.url), encoding="utf-8")
    done = runpy.run_path(str(script))
    assert "Paris" in done["reply"]
    assert json.loads(done["answer"].choices[0].message.content)["city"] in ("Paris", "Rome")
    assert len(done["vectors"].data) == len(done["several"].choices) == 2


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@pytest.mark.parametrize("page", PAGES)
def test_the_curls_run(server: Server, page: str) -> None:
    lines = [line for line in commands(page) if line.startswith("curl")]
    assert len(lines) >= 4
    for line in lines:
        assert HERE in line
        words = shlex.split(line.replace(HERE, server.url))
        done = subprocess.run([*words, "-sf"], capture_output=True, timeout=60, check=True)
        assert done.stdout, line


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_and_limit_stands_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    _, bound, *_ = cli.app.parse_args(["serve"], exit_on_error=False)
    flags = [name for name in bound.signature.parameters if name != "refs"]
    assert len(flags) > 8
    assert all(f"`--{flag}" in text for flag in flags)
    limits = [row for row in text.splitlines() if row.startswith("|")]
    for said in (
        f"{guard.MAX_BODY_BYTES >> 20} MiB",
        *map(str, (messages.MAX_MESSAGES, tools.MOST_TOOLS, schema.MAX_STOPS, schema.MAX_CHOICES)),
        *(f"{MOST_BYTES[kind] >> 10} KiB" for kind in ("json", "lark", "regex")),
        *map(str, (MOST_DEPTH, MOST_LOGPROBS, embeddings.MAX_INPUTS, worker.MAX_OPEN)),
    ):
        assert any(said in row for row in limits), said
    obeyed = {*schema.ChatAsk.model_fields} - {"model", "messages"}
    ours = [name for name in obeyed if name.startswith("guided_")]
    ours += ["top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "priority"]
    assert all(f"`{name}`" in text for name in ours)
