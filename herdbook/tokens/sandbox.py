"""Where chat templates run: Jinja's sandbox, with an end to time and memory.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from reaching out of
its language, and `range` in it ends at 100,000; yet two such loops, one in the other, would run for
hours, and `'a' * 10**10` takes the memory of a server. Therefore each rendering has

- CPU seconds, looked at wherever something can repeat itself: each turn of a loop, each call;
- characters, paid for whatever is made on the way: by operators, filters, calls and output.

    >>> print(compile("{{ 'a' * 9999999999 }}").render())
    Traceback (most recent call last):
        ...
    jinja2.exceptions.SecurityError: it writes more than 134,217,728 characters

Left out: a comparison of lists that hold each other a billion times is one operation, and not ended.
"""

from __future__ import annotations

import functools
import json
import math
import re
import threading
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError

#: for one rendering; ordinary ones take milliseconds and a few times the conversation's length
SECONDS = 2.0
CHARACTERS = 2**27
#: containers that are looked through to know how long their text would be
_LOOKED_THROUGH = 1_000_000
_CONTAINERS = (list, tuple, dict, range, KeysView, ValuesView, ItemsView)
#: what is most often put out and is no container: these very types need no closer look
_SINGLE = frozenset({int, float, bool, type(None)})

#: what can write much from little: the product of its two largest arguments, at worst
_WIDE = {"batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust"}
_WIDE |= {"replace", "rjust", "slice", "translate", "wordwrap", "zfill"}


class _Meter(threading.local):
    """What is left of a rendering, in each thread its own."""

    until = math.inf  # CPU time of this thread
    left = CHARACTERS


_meter = _Meter()


#: the day that a template is told where nobody says which: LLaMA 3.1's own, for want of a better
DAY = datetime(2024, 7, 26)


def render(program: jinja2.Template, words: Mapping[str, Any], now: datetime | None = None) -> str:
    """The template's output; jinja2.TemplateError and what else a template can raise, as it is.

    now: what `strftime_now` tells of; DAY without it.
    """
    _meter.until, _meter.left = time.thread_time() + SECONDS, CHARACTERS
    return program.render(words, strftime_now=(now or DAY).strftime)


@functools.lru_cache(maxsize=64)
def compile(source: str) -> jinja2.Template:
    """jinja2.TemplateError, SyntaxError or RecursionError for what is no program."""
    return _ENVIRONMENT.from_string(source)


@functools.lru_cache(maxsize=64)
def constant(source: str, name: str) -> Any:
    """What `{% set name = … %}` at the top of a template says, where it is a constant; else None."""
    try:
        tree = _ENVIRONMENT.parse(source)
        for node in tree.body:
            if isinstance(node, nodes.Assign) and getattr(node.target, "name", "") == name:
                value = node.node
                return value.as_const() if isinstance(value, nodes.Expr) else None
    except (jinja2.TemplateError, nodes.Impossible, RecursionError):
        return None  # told when it is rendered, in the words of `compile`
    return None


def variables(source: str) -> set[str]:
    """The names that a template takes from outside; jinja2.TemplateError for what is no program."""
    return jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source))


def _step() -> None:
    if time.thread_time() > _meter.until:
        raise SecurityError(f"it runs for more than {SECONDS:g} s")


def _too_much() -> SecurityError:
    return SecurityError(f"it writes more than {CHARACTERS:,} characters")


def _paid(value: Any) -> Any:
    """The value, once its characters are paid for."""
    kind = type(value)
    _spend(len(value) if kind is str else 1 if kind in _SINGLE else _size(value))
    return value


def _spend(characters: int) -> None:
    _meter.left -= characters
    if _meter.left < 0:
        raise _too_much()


def _size(value: Any) -> int:
    """Characters of a text; of a container, those of all it holds, as often as it holds them."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, _CONTAINERS):
        return 1
    waiting: list[Any] = [value]
    total = looked = 0
    while waiting:
        one = waiting.pop()
        looked += 1
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, _CONTAINERS):
            waiting += one
        total += 1
        if looked + len(waiting) > _LOOKED_THROUGH or total > CHARACTERS:
            raise _too_much()
    return total


def _bounded(name: str, arguments: Sequence[Any]) -> None:
    """Refuse an operation whose result may be too long, before it is made."""
    sizes = [1, 1]
    for one in arguments:
        number = isinstance(one, int) and not isinstance(one, bool)
        sizes.append(abs(one) if number else _size(one))
    if name.startswith("format") and isinstance(form := arguments[0], str):
        sizes += [int(found[:20]) for found in re.findall(r"\d+", form)]  # "%99d", "{:99}"
        if re.search(r"\*|\{[^}]*\{", form):  # widths that stand elsewhere: "%*d", "{:{}}"
            raise _too_much()
    if name in _WIDE and math.prod(sorted(sizes)[-2:]) > CHARACTERS:
        raise _too_much()


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with the attributes that tell Jinja what to hand over
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _bounded(name, [*args, *kwargs.values()])
        made = function(*args, **kwargs)
        return _paid(list(_Turns(made)) if isinstance(made, Iterator) else made)

    return bounded


class _Turns:
    """What a loop goes through, with a look at the clock before each turn."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        for one in self._items:
            _step()
            yield one

    def __len__(self) -> int:
        return len(self._items)


def _shown(value: Any) -> Any:
    """What is put out: a container is paid for before it becomes text, a text when it is joined."""
    return value if isinstance(value, str) else _paid(value)


def _joined(parts: Iterable[str]) -> str:
    """Output, also of macros: "".join that ends in time. All is paid for at once before it is made."""
    kept, size = [], 0
    for part in parts:
        size += len(part)
        if size > CHARACTERS:
            raise _too_much()
        kept.append(part)
    _spend(size)
    return "".join(kept)


#: plain numbers and truths, each told from its place
_OF_A_TURN = frozenset({"index", "index0", "first", "last"})


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`: marks what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: jinja2.runtime.Context, caller: Any) -> str:
        start, end = context["_generation_marks"]
        return f"{start}{caller()}{end}"


def _fail(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML; templates of models expect plain JSON."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            finalize=_shown,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _filter(name, one) for name, one in self.filters.items()}
        self.filters |= {" turns": _Turns, " paid": _paid}  # no template can write these names
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _fail

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The program with _Turns around what loops go through, and _paid around new texts."""

        def within(node: nodes.Node, name: str) -> nodes.Filter:
            assert isinstance(node, nodes.Expr)
            return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = within(loop.iter, " turns")
        for text in list(tree.find_all(nodes.Concat)):
            text.nodes = [within(part, " paid") for part in text.nodes]
        for item in list(tree.find_all(nodes.Getitem)):
            if isinstance(item.arg, nodes.Slice):
                item.node = within(item.node, " paid")
        return tree

    def getattr(self, obj: Any, attribute: str) -> Any:
        """What a loop says of its turn is harmless, and asked for most often: given at once."""
        if type(obj) is jinja2.runtime.LoopContext and attribute in _OF_A_TURN:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _step()
        method = getattr(function, "__wrapped__", function)  # str.format comes wrapped
        if isinstance(text := getattr(method, "__self__", None), str):
            _bounded(method.__name__, [text, *args, *kwargs.values()])
        return _paid(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sequence = isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple))
        if operator == "%" and isinstance(left, str):
            _bounded("format", [left, right])
        elif operator == "*" and sequence:
            _bounded("join", [left, right])  # both times what the two make of each other
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bounded("join", [left.bit_length(), right])
        return _paid(super().call_binop(context, operator, left, right))


_ENVIRONMENT = _Sandbox()
