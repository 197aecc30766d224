"""The command line as a user meets it: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    "raise", "chat", "serve", "eval", "export", "list", "show", "tree", "verify", "recipes", "doctor",
)  # fmt: skip


def herd(
    *arguments: str, home: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", **more}
    if home is not None:
        environment["HERDBOOK_HOME"] = str(home)
    command = [sys.executable, "-m", "herdbook.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_help_names_every_command() -> None:
    done = herd("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"{command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_with_an_example(command: str) -> None:
    done = herd(command, "--help")
    assert done.returncode == 0
    assert f"Example: herd {command}" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from herdbook import cli; cli.app(['--help'], exit_on_error=False, "
        "result_action='return_value'); print([m for m in "
        "('torch', 'numpy', 'tokenizers', 'fastapi', 'yaml', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tre",), 'Did you mean "tree"?'),
        (("tree",), "has no raised model yet\n  next: herd raise cria"),
        (("show", "cira"), "'cira' is not in the book"),
        (("list", "--kind", "modle"), "did you mean 'model'?"),
        (("raise", "crya"), "did you mean 'cria'?"),
        (("raise", "cria", "--nmae", "Luna"), "did you mean 'name'?"),
        (("raise", "cria", "--tune.ranc", "4"), "did you mean 'rank'?"),
        (("raise", "cria", "--tune.rank", "four"), "must be a whole number"),
        (("raise", "cria", "Luna"), "write settings as --key value"),
        (("raise", "alpaca"), "rows"),
        (("chat", "--temperature", "hot", "x"), "temperature"),
        (("export", "x", "y", "--to", "onnx"), "onnx"),
    ],
)
def test_wrong_input_is_told_and_leaves_no_trace(
    home: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = herd(*arguments, home=home)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert herd("list", "--json", home=home).stdout.strip() == "[]"


def test_plan_prints_the_resolved_configuration(home: Path) -> None:
    done = herd("raise", "cria", "--plan", "--name", "Nova", "--tune.rank", "4", home=home)
    plan = json.loads(done.stdout)
    assert (plan["identity"]["name"], plan["tune"]["rank"]) == ("Nova", 4)


def test_recipes_lists_in_both_languages(home: Path) -> None:
    done = herd("recipes", home=home)
    assert "cria: A small assistant" in done.stdout and "助手" in done.stdout


def test_doctor_tells_what_will_be_used(home: Path) -> None:
    found = json.loads(herd("doctor", "--json", home=home).stdout)
    assert {"processor", "cores", "memory", "gpu", "computes in", "book"} <= found.keys()
    assert str(home) in found["book"]
