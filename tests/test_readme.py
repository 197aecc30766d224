"""The documents' examples are run: every `herd` line parses, every Python block of the README runs
(those of the server's page: tests/oracles/test_server_page.py)."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from herdbook.config import from_mapping
from herdbook.evaluation.report import Report
from herdbook.evaluation.tasks.task import shipped
from tests.documents import ROOT, blocks, commands

README = ("README.md", "README.zh.md")
SERVER = ("docs/server.md", "docs/server.zh.md")
EVALUATION = ("docs/evaluation.md", "docs/evaluation.zh.md")


@pytest.mark.parametrize("document", [*README, *SERVER, *EVALUATION])
def test_every_command_parses(document: str) -> None:
    from herdbook import cli, config
    from herdbook.recipe import Recipe

    seen = 0
    for line in commands(document):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), line
        elif words[0] == "herd":
            seen += 1
            command, bound, *_ = cli.app.parse_args(words[1:], exit_on_error=False)
            if command is cli.raise_command:
                recipe, *settings = bound.args
                flags = config.parse_flags(settings)
                flags.pop("json", None)
                assert Recipe.read(recipe).resolve(flags), line
    assert seen >= (10 if document in README else 6), "it shows the commands"


@pytest.mark.parametrize("documents", [README, SERVER, EVALUATION])
def test_both_languages_show_the_same_commands(documents: tuple[str, str]) -> None:
    plain = [[shlex.split(line, comments=True) for line in commands(one)] for one in documents]
    assert [words[:2] for words in plain[0]] == [words[:2] for words in plain[1]]


@pytest.mark.parametrize("document", README)
def test_the_python_of_the_readme_runs(
    document: str, smollm2_path: Path, home: Path, tmp_path: Path
) -> None:
    (block,) = blocks(document, "python")
    script = tmp_path / "block.py"
    script.write_text(block, encoding="utf-8")
    assert runpy.run_path(str(script))["reply"]


@pytest.mark.parametrize("document", ["docs/engine.md", "docs/engine.zh.md"])
def test_the_python_of_the_engine_runs(
    document: str,
    smollm2_path: Path,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (block,) = blocks(document, "python")
    script = tmp_path / "block.py"
    script.write_text(block, encoding="utf-8")
    known = runpy.run_path(str(script))
    assert len(known["reply"].logprobs) == 4
    said = capsys.readouterr().out.splitlines()
    assert said[1] in ("red", "green", "blue")
    paris, rome = map(float, said[3].strip("[]").split(","))
    assert paris > rome


@pytest.mark.parametrize("document", EVALUATION)
def test_the_tasks_of_the_evaluation_page_are_asked(
    document: str,
    smollm2_path: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (rows,), (task, step) = blocks(document, "jsonl"), blocks(document, "yaml")
    Path("rivers.jsonl").write_text(rows, encoding="utf-8")
    Path("river-texts.yaml").write_text(task, encoding="utf-8")
    (block,) = blocks(document, "python")
    Path("block.py").write_text(block, encoding="utf-8")
    known = runpy.run_path("block.py")
    assert [figures["metric"] for _, figures in known["reports"]] == ["acc", "acc_bytes"]
    assert [row["right"] for row in known["rows"]] == [[0], [1], [2]]
    settings = yaml.safe_load(step)["report"]
    assert settings.pop("do") == "Report"
    report = from_mapping(Report, settings, where="report")
    assert report.max_drop == {"mmlu": 0.01} and report.tasks == ("mmlu",)


def test_the_evaluation_page_names_every_task() -> None:
    for document in EVALUATION:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert [name for name in shipped() if f"`{name}`" not in text] == []
