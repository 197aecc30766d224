"""The two programs that check model-written code, each in a sandbox of its own; started by
`running.py` as text, so it leans on the standard library alone.

`candidate` runs the model's code and answers calls of its functions. `checker` runs the task's tests,
in which those functions are stand-ins that call the other side. So code under test shares no process
with the tests: it can neither patch them nor say that they passed. All that crosses is data: numbers,
texts, lists, tuples, sets, dictionaries, errors by name. An object of any other kind stays where it
is and crosses as a handle, which can be passed back but not compared.

A frame is a JSON value in a line.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

#: most bytes in a frame, most items taken from an iterator
FRAME, ITEMS = 8 << 20, 100_000


class Uncomparable(TypeError):
    pass


class Timeout(BaseException):
    pass


class Handle:
    """An object on the other side."""

    def __init__(self, number: int, kind: str) -> None:
        self.number, self.kind = number, kind

    def _refuse(self, *_: Any) -> Any:
        raise Uncomparable(f"the code gives a {self.kind}, which tests cannot look into")

    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __call__ = _refuse
    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return self._refuse()


class Link:
    """Frames over a pair of pipes. With `objects`, what is no data is kept there by number."""

    def __init__(self, read: BinaryIO, write: BinaryIO, objects: list[Any] | None = None) -> None:
        self.read, self.write, self.objects = read, write, objects

    def send(self, *frame: Any) -> None:
        line = json.dumps(frame).encode("ascii") + b"\n"
        if len(line) > FRAME:
            raise ValueError("a value of more than 8 MB")
        self.write.write(line)
        self.write.flush()

    def receive(self) -> list[Any]:
        line = self.read.readline(FRAME + 1)
        if not line.endswith(b"\n"):
            raise EOFError("the program ended before it answered")
        frame = json.loads(line)
        if not isinstance(frame, list) or not frame:
            raise ValueError("the program's answer cannot be read")
        return frame

    def pack(self, value: Any) -> Any:
        """
        >>> Link(None, None).pack([1, (2.5, {"a": {3}})])
        ['l', 1, ['t', 2.5, ['d', ['a', ['s', 3]]]]]
        """
        if value is None or isinstance(value, bool):
            return value
        for plain in (int, float, str):  # of a subclass, what it is worth
            if isinstance(value, plain):
                return plain(value) if type(value) is not plain else value
        for sequence, mark in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "z")):
            if isinstance(value, sequence):
                return [mark, *map(self.pack, value)]
        if isinstance(value, dict):
            return ["d", *([self.pack(k), self.pack(v)] for k, v in value.items())]
        if isinstance(value, bytes | bytearray):
            return ["b", value.hex()]
        if isinstance(value, complex):
            return ["c", value.real, value.imag]
        if isinstance(value, range):
            return ["r", value.start, value.stop, value.step]
        if isinstance(value, Handle):
            return ["h", value.number, value.kind]
        if isinstance(value, Iterator):
            return ["i", *map(self.pack, itertools.islice(value, ITEMS))]
        if self.objects is None:
            raise Uncomparable(f"the test passes a {type(value).__name__}, which cannot be sent")
        self.objects.append(value)
        return ["h", len(self.objects) - 1, type(value).__name__]

    def unpack(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        mark, *rest = value
        if mark in ("l", "t", "s", "z", "i"):
            items = map(self.unpack, rest)
            makers: dict[str, Callable[[Any], Any]]
            makers = {"l": list, "t": tuple, "s": set, "z": frozenset}
            return makers[mark](items) if mark in makers else iter(list(items))
        if mark == "d":
            return {self.unpack(k): self.unpack(v) for k, v in rest}
        if mark == "h":
            number, kind = int(rest[0]), str(rest[1])[:80]
            return Handle(number, kind) if self.objects is None else self.objects[number]
        return {"b": bytes.fromhex, "c": complex, "r": range}[mark](*rest)  # type: ignore[operator]


def candidate() -> None:
    """Define the model's code, then answer calls until the other side ends."""
    link = Link(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"), [])
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    link.send("ready")
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and pickle look there
    space = module.__dict__
    try:
        exec(compile(link.receive()[0], "<solution>", "exec"), space)  # noqa: S102
        link.send("value", None)
    except BaseException as error:  # noqa: BLE001
        _send_error(link, error)
        return
    while True:
        name, args, kwargs = link.receive()
        try:
            value = space[name](*link.unpack(args), **link.unpack(kwargs))
            link.send("value", link.pack(value))
        except BaseException as error:  # noqa: BLE001
            _send_error(link, error)


def _send_error(link: Link, error: BaseException) -> None:
    text = f"{error}" if not isinstance(error, KeyError) else f"{error.args[0]!r}"
    link.send("error", type(error).__name__, text[:300])


def _raise(name: str, text: str) -> Any:
    """The error of the other side, as Python's own of that name."""
    kind = getattr(builtins, str(name)[:80], None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            error = kind(text)
        except TypeError:  # UnicodeDecodeError and its like want five arguments
            error = ValueError(text)
        raise error
    raise RuntimeError(f"{name}: {text}" if text else str(name))


def checker(read: int, write: int) -> None:
    """Run the tests of the task on stdin; say on stdout how they ended."""
    task = json.load(sys.stdin)
    verdict = os.fdopen(os.dup(1), "w")
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    why = ""
    try:
        _check(task, Link(os.fdopen(read, "rb"), os.fdopen(write, "wb")))
    except Timeout:
        why = f"timed out after {task['seconds']:g} s"
    except BaseException as error:  # noqa: BLE001
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
    verdict.write(json.dumps({"passed": not why, "why": why[:300]}))
    verdict.flush()


def _check(task: dict[str, Any], link: Link) -> None:
    def ring(*_: Any) -> None:
        raise Timeout

    link.receive()  # it is ready; the clock starts
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, task["seconds"])

    def answer() -> Any:
        kind, *rest = link.receive()
        return link.unpack(rest[0]) if kind == "value" else _raise(rest[0], rest[1])

    def stand_in(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            link.send(name, link.pack(list(args)), link.pack(kwargs))
            return answer()

        return call

    link.send(task["source"])
    answer()
    space: dict[str, Any] = {"__name__": "tests"}
    space |= {name: stand_in(name) for name in task["functions"]}
    if task["preamble"]:
        try:
            preamble = compile(task["preamble"], "<preamble>", "exec")
        except SyntaxError:  # it ends with a function's head
            preamble = compile(task["preamble"] + "\n    pass\n", "<preamble>", "exec")
        exec(preamble, space)  # noqa: S102
    tests = ast.parse(task["tests"], "<tests>")
    names = {node.id for node in ast.walk(tests) if isinstance(node, ast.Name)}
    for name in names | {task["entry_point"]} - {""}:
        if name == task["entry_point"] or not (name in space or hasattr(builtins, name)):
            space[name] = stand_in(name)
    exec(compile(tests, "<tests>", "exec"), space)  # noqa: S102
    if task["entry_point"]:
        space["check"](space[task["entry_point"]])
    signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    if sys.argv[1] == "candidate":
        candidate()
    else:
        checker(int(sys.argv[2]), int(sys.argv[3]))
