"""Code tasks: does a model-written function pass its tests? HumanEval's and MBPP's shapes.

The code and its tests run in two sandboxes (`sandbox.py`, `worker.py`). A sample passes only
when the tests ran to their end; whatever else happens is a failure with its reason. What differs from
running both in one process, as the published scorers do: arguments that a function changes in place
do not come back, and results must be data. All 164 reference solutions of HumanEval pass.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herdbook.errors import DataError
from herdbook.evaluation.code.sandbox import STARTING_S, Limits, Sandbox, read_all

_WORKER = Path(__file__).with_name("worker.py").read_text(encoding="utf-8")
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
#: where a completion of a function's body ends: the next statement at the margin (Chen 2021)
_MARGIN = re.compile(r"\n(?=(?:class|def|if|for|while|print|import|from|assert)\b|[#@`])")


#: three seconds, as the published scorers give
DEFAULT = Limits()


@dataclass(frozen=True)
class CodeTask:
    """`preamble` is the task's own code that the tests may use; with an `entry_point` the tests
    define `check(candidate)`, without one they call functions by name: those of `functions`, and what
    is neither the preamble's nor a builtin."""

    source: str
    tests: str
    entry_point: str = ""
    preamble: str = ""
    functions: tuple[str, ...] = ()


@dataclass(frozen=True)
class CodeVerdict:
    passed: bool
    why: str = ""  # of a failure


def human_eval(row: Mapping[str, Any], reply: str) -> CodeTask:
    """A row of HumanEval (prompt, test, entry_point) with a reply: a completion of the prompt, or a
    message that holds the whole function."""
    prompt, test, entry = _fields(row, "prompt", "test", "entry_point")
    head = reply.partition("```")[0]
    if head.strip() and head[:1].isspace():  # a body; the fence behind it closes none
        reply = head
    code = fenced(reply)
    if code is None and not re.search(
        rf"^(?:async )?def {re.escape(entry)}\b", reply, re.MULTILINE
    ):
        return CodeTask(prompt + completion(reply), test, entry, prompt)
    # the prompt's imports and helpers stay; its unfinished function is defined anew
    return CodeTask(f"{_closed(prompt)}\n{reply if code is None else code}", test, entry, prompt)


def mbpp(row: Mapping[str, Any], reply: str) -> CodeTask:
    """A row of MBPP (test_list, perhaps test_setup_code) with a reply that holds the functions. Setup
    code that changes the candidate's own objects cannot be run: they stay on their side."""
    tests = row.get("test_list")
    if not isinstance(tests, list) or not all(isinstance(one, str) for one in tests):
        raise DataError("a row of MBPP", rule="needs test_list, a list of asserts", next="mend it")
    code = fenced(reply)
    setup = str(row.get("test_setup_code") or "")
    source = reply if code is None else code
    return CodeTask(source, "\n".join(tests), "", setup, _defined(row.get("code")))


def _defined(code: Any) -> tuple[str, ...]:
    """The functions and classes of a row's reference solution: what its tests call."""
    try:
        body = ast.parse(code).body if isinstance(code, str) else []
    except SyntaxError:
        return ()
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return tuple(one.name for one in body if isinstance(one, kinds))


def fenced(reply: str) -> str | None:
    """The code blocks of a reply, one after the other; None where there is none.

    >>> fenced("Here:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1\\n'
    """
    blocks = _FENCE.findall(reply)
    return "".join(blocks) if blocks else None


def completion(reply: str) -> str:
    """A function's body without what a model writes after it; the first line's indent may be lost.

    >>> completion("return 1\\n\\ndef other():\\n    pass")
    '    return 1\\n'
    """
    body = reply if reply[:1].isspace() else "    " + reply
    return _MARGIN.split(body, maxsplit=1)[0]


def check(task: CodeTask, limits: Limits = DEFAULT) -> CodeVerdict:
    """Run one task. Errors: SandboxError where code cannot be shut in."""
    with contextlib.ExitStack() as open_:
        (calls, ask), (answers, answer), (orders, order), (verdict, tell) = (
            [
                open_.enter_context(os.fdopen(end, mode))
                for end, mode in zip(os.pipe(), modes, strict=True)
            ]
            for modes in [("rb", "wb")] * 4
        )
        ends = answers.fileno(), ask.fileno()
        one = Sandbox(
            _WORKER, ["candidate"], limits=limits, stdin=calls.fileno(), stdout=answer.fileno()
        )
        open_.enter_context(one)
        two = Sandbox(
            _WORKER,
            ["checker", *map(str, ends)],
            limits=limits,
            stdin=orders.fileno(),
            stdout=tell.fileno(),
            keep=ends,
        )
        open_.enter_context(two)
        for end in (calls, answer, answers, ask, orders, tell):
            end.close()
        fields = {name: getattr(task, name) for name in CodeTask.__dataclass_fields__}
        with contextlib.suppress(BrokenPipeError):  # it died: told below
            order.write(json.dumps(fields | {"seconds": limits.seconds}).encode())
            order.close()
        told = read_all(verdict.fileno(), limits.output_bytes, limits.seconds + STARTING_S)
    if not told:
        return CodeVerdict(False, "the tests ended without a verdict")
    found = json.loads(told)
    return CodeVerdict(found["passed"], found["why"])


def check_all(
    tasks: Sequence[CodeTask], limits: Limits = DEFAULT, workers: int | None = None
) -> list[CodeVerdict]:
    """Verdicts in the order of the tasks; as many at once as there are cores."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda task: check(task, limits), tasks))


def _closed(prompt: str) -> str:
    """The prompt as code that stands for itself."""
    try:
        compile(prompt, "<prompt>", "exec")
    except SyntaxError:
        return prompt + "\n    pass\n"
    return prompt


def _fields(row: Mapping[str, Any], *names: str) -> list[str]:
    missing = [name for name in names if not isinstance(row.get(name), str)]
    if missing:
        raise DataError(
            f"a row with {', '.join(sorted(row)) or 'nothing'}",
            rule=f"lacks {', '.join(missing)} of a code task",
            next="give each row prompt, test and entry_point, or test_list",
        )
    return [str(row[name]) for name in names]
