"""The terminal chat, with stdin and stdout as pipes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from herdbook import cli
from herdbook.engine.loading import load
from herdbook.engine.request import Request, Sampling
from herdbook.errors import CapacityError, RequestError
from herdbook.serving.chat import Talk, chat, converse
from herdbook.serving.worker import Worker
from herdbook.tokens.chat import render

SHORT = Sampling(max_tokens=8)


def reply_to(worker: Worker, turns: list[dict[str, str]]) -> str:
    ids = render(worker.engine.tokenizer, turns, reply=True).ids
    return "".join(piece.text for piece in worker.pieces(Request(ids, SHORT)))


def typed(
    lines: list[str], worker: Worker, monkeypatch: pytest.MonkeyPatch, system: str | None = None
) -> Talk:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    talk = Talk(worker, system, SHORT)
    converse(talk, "tiny")
    return talk


def test_one_reply_is_alone_on_stdout(
    tiny_folder: Path, worker: Worker, capsys: pytest.CaptureFixture[str]
):
    chat(load(tiny_folder), "tiny", Sampling(max_tokens=8), prompt="hello", system="be brief")
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
    ]
    assert capsys.readouterr().out == reply_to(worker, turns) + "\n"


def test_a_templates_text_ends_a_reply(
    tiny_folder: Path, stopping: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
):
    file, whole, left = stopping
    settings, other = Sampling(max_tokens=24), load(tiny_folder, template=str(file))
    chat(load(tiny_folder), "tiny", settings, prompt="你好")
    chat(other, "tiny", settings, prompt="你好", as_json=True)
    said = capsys.readouterr().out
    assert said.startswith(whole + "\n")
    found = json.loads(said.removeprefix(whole + "\n"))
    assert (found["reply"], found["finish_reason"]) == (left, "stop")


def test_one_reply_as_json(tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    chat(load(tiny_folder), "tiny", Sampling(max_tokens=8), prompt="hello", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"reply", "finish_reason", "usage"}
    assert found["finish_reason"] in ("stop", "length")
    assert 1 <= found["usage"]["completion_tokens"] <= 8


def test_a_wrong_setting_is_told_before_loading(tmp_path: Path):
    with pytest.raises(RequestError, match="top_p=3"):
        cli.chat(str(tmp_path / "nothing here"), prompt="hello", top_p=3)


def test_a_conversation_keeps_its_history(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    talk = typed(["hello", "", "who are you"], worker, monkeypatch)
    first = reply_to(worker, [{"role": "user", "content": "hello"}])
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "who are you"},
    ]
    second = reply_to(worker, turns)
    assert first and second
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    assert talk.turns == [*turns, {"role": "assistant", "content": second}]


def test_commands(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    talk = typed(
        ["hello", "/system be kind", "/nonsense", "/help", "hello", "/quit", "never read"],
        worker,
        monkeypatch,
    )
    found = capsys.readouterr()
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
    ]
    reply = reply_to(worker, turns)
    assert talk.turns == [*turns, {"role": "assistant", "content": reply}]
    assert found.out.endswith(reply + "\n")
    assert "/nonsense is no command" in found.err and "/nonsense" not in found.out
    typed(["/system", "/reset"], worker, monkeypatch, system="be kind")


def test_reset_keeps_the_system_message(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    talk = typed(["hello", "/reset"], worker, monkeypatch, system="be kind")
    assert talk.turns == [{"role": "system", "content": "be kind"}]
    talk = typed(["hello", "/system"], worker, monkeypatch, system="be kind")
    assert talk.turns == []


def test_a_conversation_that_no_longer_fits(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CapacityError, match="context holds 512"):
        typed(["你好" * 300], worker, monkeypatch)


class Interrupting(io.StringIO):
    """A terminal whose user presses Ctrl-C after the first part of the reply."""

    def __init__(self) -> None:
        super().__init__()
        self.pressed = False

    def write(self, text: str) -> int:
        count = super().write(text)
        if text.strip() and not self.pressed:
            self.pressed = True
            raise KeyboardInterrupt
        return count


def test_ctrl_c_interrupts_only_the_reply(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    out: Any = Interrupting()
    monkeypatch.setattr("sys.stdout", out)
    talk = typed(["hello", "hello"], worker, monkeypatch)
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant", "user", "assistant"]
    whole = reply_to(worker, [{"role": "user", "content": "hello"}])
    said = talk.turns[1]["content"]
    assert said and whole.startswith(said) and said != whole  # what was said stays
    assert worker.open == 0
