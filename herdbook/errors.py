"""Every error that Herdbook raises for its user, on one page.

A user error says three things: what was received, which rule it breaks, and the next thing to try.

>>> str(ConfigError("key 'ranc'", rule="is no setting of step tune", next="did you mean 'rank'?"))
"key 'ranc' is no setting of step tune\\n  next: did you mean 'rank'?"

Tree::

    HerdbookError
    ├── ConfigError      a recipe, flag or setting that cannot be
    ├── UnknownName      a reference to a model, artifact, recipe or step that is not there
    ├── FetchError       something from outside could not be had (offline, wrong hash)
    ├── FileError        a foreign file that is broken, unsafe or not of a known format
    │   └── FamilyError  a checkpoint whose family or shape is not known
    ├── DataError        rows that cannot be used; names them
    ├── TemplateError    a chat template that is missing or fails
    ├── CapacityError    it does not fit: memory, disk, context, pages
    ├── BookError        the book cannot be opened or written, or its contents changed
    ├── GateError        a step finished, but its result breaks a gate that the recipe sets
    ├── SandboxError     model-written code cannot be shut in here, so it is not run
    ├── ServeError       the server cannot start (port in use, no key)
    └── RequestError     one request to the engine or the server is wrong (400)

Bugs of our own are asserts, never one of these.
"""

from __future__ import annotations


class HerdbookError(Exception):
    """What was received, the rule it breaks, the next thing to try. Exit code 1 in the terminal."""

    exit_code = 1

    def __init__(self, what: str, *, rule: str = "", next: str = "") -> None:
        self.what, self.rule, self.next = what, rule, next
        super().__init__(what)

    def __str__(self) -> str:
        line = f"{self.what} {self.rule}".strip()
        return f"{line}\n  next: {self.next}" if self.next else line


class ConfigError(HerdbookError):
    exit_code = 2


class UnknownName(HerdbookError):
    exit_code = 2


class FetchError(HerdbookError):
    pass


class FileError(HerdbookError):
    pass


class FamilyError(FileError):
    pass


class DataError(HerdbookError):
    pass


class TemplateError(HerdbookError):
    pass


class CapacityError(HerdbookError):
    pass


class BookError(HerdbookError):
    pass


class GateError(HerdbookError):
    pass


class SandboxError(HerdbookError):
    pass


class ServeError(HerdbookError):
    pass


class RequestError(HerdbookError):
    pass


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """«did you mean 'rank'?» when one is close, else the list of what is known."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known are: " + ", ".join(sorted(known)) if known else "there are none yet"
