"""`herd chat`: talk to a model in the terminal.

    herd chat cria -p "Who are you?"     the reply alone on stdout, and nothing else
    herd chat cria                       a conversation; /help lists what can be typed
    herd chat cria < questions.txt       one turn a line, one after the other

Greedy unless a temperature is given, and then with seed 0: the same question gives the same reply
each time, here as from the server. The engine runs in a worker's thread, so Ctrl-C only ends the
waiting: it aborts the reply, and the engine is ready for the next turn.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator
from datetime import datetime

from herdbook.engine.loaded import LoadedModel
from herdbook.engine.request import Request, Sampling
from herdbook.errors import CapacityError, FileError, HerdbookError
from herdbook.serving.worker import Worker
from herdbook.tokens.chat import render

HELP = """\
/reset          forget the conversation (the system message stays)
/system TEXT    set the system message and start anew; without TEXT: none
/quit           leave (so does Ctrl-D); Ctrl-C interrupts a reply"""


def chat(
    model: LoadedModel,
    name: str,
    sampling: Sampling,
    *,
    prompt: str | None = None,
    system: str | None = None,
    as_json: bool = False,
) -> None:
    """One reply to `prompt` on stdout; without a prompt, a conversation until /quit.

    name: what the model is called. as_json: with a prompt, one object with the reply, why it ended and
    the tokens it took.
    """
    worker = Worker(name, lambda: model.engine)
    worker.start()
    worker.wait()
    try:
        talk = Talk(worker, system, sampling)
        if prompt is None:
            converse(talk, name)
        else:
            _reply_once(talk, prompt, as_json)
    finally:
        worker.stop(grace_s=0)


class Talk:
    """A conversation: its turns, and who answers. A reply joins the turns once it has begun."""

    def __init__(self, worker: Worker, system: str | None, sampling: Sampling) -> None:
        self.worker, self.sampling = worker, sampling
        self.finish: str | None = None  # why the last reply ended
        self.usage: dict[str, int] = {}
        self.restart(system)

    def restart(self, system: str | None) -> None:
        self.system = system
        self.turns = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> Generator[str, None, None]:
        """The reply in parts. Interrupted, what was said so far stays in the conversation."""
        turns = [*self.turns, {"role": "user", "content": text}]
        request = self._request(turns)
        parts: list[str] = []
        self.finish, self.usage = None, {}
        with contextlib.closing(self.worker.pieces(request)) as pieces:
            try:
                for piece in pieces:
                    parts.append(piece.text)
                    if piece.reply is not None:
                        self.finish = piece.finish
                        self.usage = {
                            "prompt_tokens": piece.reply.prompt_tokens,
                            "completion_tokens": piece.reply.completion_tokens,
                        }
                    yield piece.text
            finally:
                if said := "".join(parts):
                    self.turns = [*turns, {"role": "assistant", "content": said}]

    def _request(self, turns: list[dict[str, str]]) -> Request:
        engine = self.worker.engine
        if engine.tokenizer is None:
            raise FileError(
                "this model came without a tokenizer",
                rule="so it cannot be talked to",
                next="add tokenizer.json to its folder",
            )
        ids = render(engine.tokenizer, turns, reply=True, now=datetime.now()).ids
        if len(ids) >= engine.most_tokens:
            raise CapacityError(
                f"the conversation has {len(ids)} tokens",
                rule=f"and the context holds {engine.most_tokens}, the reply included",
                next="start anew (/reset in the chat), or say it in fewer words",
            )
        return Request(ids, self.sampling, stop=engine.tokenizer.stop_strings, trim=True)


def _reply_once(talk: Talk, prompt: str, as_json: bool) -> None:
    if as_json:
        reply = "".join(talk.say(prompt))
        found = {"reply": reply, "finish_reason": talk.finish, "usage": talk.usage}
        print(json.dumps(found, ensure_ascii=False))
        return
    for part in talk.say(prompt):
        sys.stdout.write(part)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def converse(talk: Talk, name: str) -> None:
    """Read, answer, repeat. From a pipe: no prompt signs, only the replies on stdout."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history in input()
        print(f"You are talking to {name}. /help says what you can type; Ctrl-D leaves.")
    while (line := _read(terminal)) is not None:
        line = line.strip()
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            print(_command(talk, line), file=sys.stdout if terminal else sys.stderr)
        elif line:
            try:
                _answer(talk, line)
            except HerdbookError as error:  # this turn failed; the conversation is as before
                if not terminal:
                    raise
                print(error)


def _read(terminal: bool) -> str | None:
    """The next line; None when there is none any more."""
    if not terminal:
        return sys.stdin.readline() or None
    try:
        return input("\n> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:  # with nothing to interrupt: a fresh line
        print("\n(/quit or Ctrl-D leaves)")
        return ""


def _answer(talk: Talk, line: str) -> None:
    with contextlib.closing(talk.say(line)) as parts:
        try:
            for part in parts:
                sys.stdout.write(part)
                sys.stdout.flush()
            print(flush=True)
            if talk.finish == "length":
                print("(cut off at the token limit; --max-tokens raises it)", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(interrupted)", file=sys.stderr)


def _command(talk: Talk, line: str) -> str:
    word, _, rest = line.partition(" ")
    match word:
        case "/help":
            return HELP
        case "/reset":
            talk.restart(talk.system)
            return "(a new conversation)"
        case "/system":
            talk.restart(rest.strip() or None)
            return f"(a new conversation; system message: {talk.system or 'none'})"
        case _:
            return f"{word} is no command.\n{HELP}"
