"""The command line as a user meets it: a process, its output, its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from herdbook import cli
from herdbook.book.book import Book
from herdbook.model.fetch import Fetch
from herdbook.tokens import templates

COMMANDS = (
    "raise", "chat", "serve", "eval", "export", "delta", "list", "show", "tree", "verify", "recipes",
    "doctor", "templates", "tokenizer", "keys", "plan", "arena", "judge", "tasks", "compare",
)  # fmt: skip
TOKENIZER = ("train", "extend", "prune", "fertility")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Herd = Callable[..., Done]


@pytest.fixture
def herd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Herd:
    """The entry point of `herd`, called here: a process of its own would import torch each time."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["herd", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return Done(int(ended.value.code or 0), told.out, told.err)

    return call


def test_help_names_every_command(herd: Herd) -> None:
    done = herd("--help")
    assert done.code == 0
    for command in COMMANDS:
        assert f"{command} " in done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_with_an_example(herd: Herd, command: str) -> None:
    done = herd(command, "--help")
    assert done.code == 0
    assert f"Example: herd {command}" in done.out


@pytest.mark.parametrize("command", TOKENIZER)
def test_every_command_about_tokenizers_teaches_too(herd: Herd, command: str) -> None:
    assert f"{command} " in herd("tokenizer", "--help").out
    assert f"Example: herd tokenizer {command}" in herd("tokenizer", command, "--help").out


def test_tokenizers_from_text_to_comparison(herd: Herd, home: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("one fish, two fish, red fish, blue fish\n一鱼，二鱼，红鱼，蓝鱼\n" * 3)
    for algorithm, name in (("bpe", "pieces"), ("bytes", "raw")):
        size = "--size=290" if name == "pieces" else "--size=275"
        done = herd("tokenizer", "train", str(text), size, "--algorithm", algorithm, "--name", name)
        assert done.code == 0 and done.out.startswith(f"{name}@1: vocabulary "), done.err
        assert Path(done.out.splitlines()[1], "tokenizer.json").is_file()
    done = herd(
        "tokenizer", "fertility", str(text), "--before", "raw", "--after", "pieces", "--json"
    )
    found = json.loads(done.out)
    for which in ("before", "after"):
        assert list(found[which]) == ["all", "Latin", "Han"]
        assert found[which]["all"]["characters"] == len(text.read_text())
    assert found["after"]["Han"]["tokens"] < found["before"]["Han"]["tokens"]
    table = herd("tokenizer", "fertility", str(text), "--before", "raw", "--after", "pieces").out
    assert "before: raw, 275 tokens\nafter: pieces, 290 tokens" in table and "Latin" in table
    few = tmp_path / "few.txt"
    few.write_text("one fish")
    made = json.loads(herd("tokenizer", "prune", "pieces", str(few), "--json").out)
    assert (made["ref"], made["kind"], made["step"]) == (
        "pieces-pruned@1",
        "tokenizer",
        "PruneTokenizer",
    )
    done = herd("tokenizer", "extend", "pieces-pruned", "pieces", "--name", "again")
    assert "vocabulary 290" in done.out, done.err
    assert [one.name for one in Book(home).entries("tokenizer")] == [
        *("pieces", "raw", "pieces-pruned", "again"),
    ]


def test_as_a_process(home: Path) -> None:
    """Errors go to stderr alone, without a traceback."""
    command = [sys.executable, "-m", "herdbook.cli", "show", "cira"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stderr.startswith("herd: 'cira' is not in the book\n  next: ")
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stdout) == (2, "")


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
        (("raise", "cria", "--name"), "name is True but must be text"),
        (("raise", "alpaca"), "rows.data is empty but the step needs it\n  next: set data"),
        (("raise", "alpaca", "--data", "none.json"), "none.json is not there"),
        (("chat", "--temperature", "hot", "x"), "temperature"),
        (("chat", "no.gguf"), "'no.gguf' is no model in the book, no folder"),
        (("chat", "smollm2", "-p", "hi", "--template", "vicunna"), "did you mean 'vicuna'?"),
        (("serve", "smollm2", "--template", "vicunna"), "did you mean 'vicuna'?"),
        (("templates", "vicunna"), "did you mean 'vicuna'?"),
        (("raise", "cria", "--base.template", "vicunna"), "did you mean 'vicuna'?"),
        (("serve", "smollm2", "--lora", "luna"), "--lora luna must be NAME=REF"),
        (("serve", "smollm2", "--port", "99999"), "port 99999 is none: ports go to 65535"),
        (("export", "x", "y", "--to", "onnx"), "onnx"),
        (("export", "x", "/dev/null/y", "--to", "hf"), "/dev/null/.y"),
        (("eval", "smollm2", "--text", "/"), "herd: /"),
        (("delta", "make", "no", "none", "x"), "'no' is no model in the book"),
        (("delta", "aply", "no", "none", "x"), 'Did you mean "apply"?'),
        (("tokenizer", "train"), "traintokenizer has no text"),
        (("tokenizer", "train", "none.txt"), "none.txt is not there"),
        (("tokenizer", "train", "/"), "/ is a folder; expected a file"),
        (("tokenizer", "train", "none.txt", "--algorithm", "wordpiece"), "wordpiece"),
        (("tokenizer", "extend", "x.model", "y.model"), "'y.model' is no model and no tokenizer"),
        (("tokenizer", "prune", "nobody", "none.txt"), "'nobody' is no model and no tokenizer"),
        (("tokenizer", "fertility", "--before", "x"), "nothing holds no text"),
        (("tokenizer", "prnue"), "prune"),
        (("serve", "smollm2", "--memory", "4 lots"), "must be a size such as 4GB"),
        (("serve", "smollm2", "--memory", "1MB"), "and the server may use 1.0 MB"),
        (("serve", "smollm2", "--idle", "10"), "must be a time such as 30s, 10m or 1h"),
        (("keys", "add", "a b"), "must be 1 to 64 letters"),
        (("keys", "add", "a", "--tokens", "0"), "must be at least 1"),
        (("keys", "revoke", "nobody"), "'nobody' has no key"),
    ],
)
def test_wrong_input_is_told_and_leaves_no_trace(
    herd: Herd, home: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = herd(*arguments)
    assert message in done.err
    assert done.code in (1, 2)
    assert done.out == ""
    assert Book(home).entries() == []


def test_keys_are_shown_once_and_end(herd: Herd, home: Path) -> None:
    key = herd("keys", "add", "alice", "--requests", "60").out.strip()
    assert key.startswith("herd-") and len(key) > 40
    listed = json.loads(herd("keys", "list", "--json").out)
    assert [(one["name"], one["requests_per_minute"], one["revoked"]) for one in listed] == [
        ("alice", 60, None)
    ]
    table = herd("keys", "list").out
    assert "alice" in table and key not in table
    assert "has a key already" in herd("keys", "add", "alice").err
    assert herd("keys", "revoke", "alice").out == "alice is revoked\n"
    assert json.loads(herd("keys", "list", "--json").out)[0]["revoked"]


def test_delta_there_and_back(herd: Herd, tiny_folder: Path, tmp_path: Path) -> None:
    base, delta, again = str(tiny_folder), str(tmp_path / "delta"), str(tmp_path / "again")
    made = herd("delta", "make", base, base, delta)
    assert made.code == 0 and made.out.startswith(f"{delta}: tensors 29, values ")
    done = herd("delta", "apply", base, delta, again, "--json")
    assert json.loads(done.out)["tensors"] == 29
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_folder / name).read_bytes()
    refused = herd("chat", delta, "-p", "hello")
    assert refused.code == 1 and f"next: herd delta apply BASE {delta} PATH" in refused.err


def test_a_delta_of_another_tool(herd: Herd, tiny_folder: Path, tmp_path: Path) -> None:
    base, sum = str(tiny_folder), str(tmp_path / "sum")  # the model itself is as good a delta
    refused = herd("delta", "apply", base, base, sum)
    assert refused.code == 1 and "next: add --unchecked" in refused.err
    done = herd("delta", "apply", base, base, sum, "--unchecked")
    assert done.code == 0 and done.out.strip().endswith("checked names and shapes alone, no hash")
    wrong = herd("delta", "apply", base, base, sum + "2", "--expect", "sha256:0")
    assert wrong.code == 1 and "but sha256:0 was expected" in wrong.err


@pytest.mark.parametrize("command", ["make", "apply"])
def test_delta_teaches_with_an_example(herd: Herd, command: str) -> None:
    assert f"Example: herd delta {command}" in herd("delta", command, "--help").out


def test_plan_prints_the_resolved_configuration(herd: Herd) -> None:
    done = herd("raise", "cria", "--plan", "--name", "Nova", "--tune.rank", "4")
    plan = json.loads(done.out)
    assert (plan["identity"]["name"], plan["tune"]["rank"]) == ("Nova", 4)


@pytest.mark.parametrize(
    ("spoken", "said"), [("en_US.UTF-8", "A small assistant"), ("zh_CN", "助手")]
)
def test_recipes_are_listed_in_the_terminal_s_language(
    herd: Herd, monkeypatch: pytest.MonkeyPatch, spoken: str, said: str
) -> None:
    monkeypatch.setenv("LC_ALL", spoken)
    lines = herd("recipes").out.splitlines()
    assert any(line.startswith("cria  ") and said in line for line in lines)


def test_templates_are_listed_and_shown(herd: Herd) -> None:
    listed = herd("templates").out.splitlines()
    assert "vicuna            Vicuna 1.1 and later, LongChat, WizardLM 13B to 70B" in listed
    assert all(len(line) <= 100 for line in listed) and len(listed) > 30
    assert herd("templates", "koala").out == templates.read("koala")
    assert json.loads(herd("templates", "koala", "--json").out) == {
        "koala": templates.read("koala")
    }


def test_doctor_tells_what_will_be_used(herd: Herd, home: Path) -> None:
    found = json.loads(herd("doctor", "--json").out)
    assert {"processor", "cores", "memory", "gpu", "computes in", "book"} <= found.keys()
    assert str(home) in found["book"]


def test_show_overwrites_nothing_but_its_own_pages(
    herd: Herd, home: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    Fetch(ref=str(tiny_folder)).run(Book(home), name="mine")
    page, letter = tmp_path / "page.html", tmp_path / "letter.txt"
    letter.write_text("Dear Ada,")
    assert herd("show", "mine", "--out", str(page)).code == 0
    assert herd("show", "mine", "--out", str(page)).code == 0, "its own page may be written again"
    refused = herd("show", "mine", "--out", str(letter))
    assert refused.code != 0 and "is no page of Herdbook's" in refused.err
    assert letter.read_text() == "Dear Ada,"
