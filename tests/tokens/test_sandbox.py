"""What a template may not do: leave its language, run on, or take memory without end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from herdbook.errors import TemplateError
from herdbook.tokens import sandbox
from herdbook.tokens.chat import render
from herdbook.tokens.tokenizer import Tokenizer
from tests.tokens.conftest import byte_metadata

TALK = [{"role": "user", "content": "hi"}]
GROWING = "{% set n = namespace(s=SEED) %}{% for i in range(99) %}{% set n.s = STEP %}{% endfor %}"


def growing(seed: str, step: str, end: str = "") -> str:
    return GROWING.replace("SEED", seed).replace("STEP", step) + end


def written(source: str, **words: Any) -> str:
    return sandbox.render(sandbox.compile(source), {"messages": TALK, **words})


RUNNING = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% for i in range(99999) %}{% set x = range(99999) | map('string') | list %}{% endfor %}",
    "{% set r = range(100000) | list %}{% for i in range(99999) %}{% set x = r[1:] %}{% endfor %}",
]
WRITING = [
    "{{ 'a' * 9999999999 }}",
    "{{ 9999999999 * 'a' }}",
    "{{ [1] * 9999999999 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a' | center(9999999999) }}",
    "{{ 'a'.ljust(9999999999) }}",
    "{{ '\t'.expandtabs(9999999999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 9999999999) }}",
    "{{ '{a:{b}}'.format_map({'a': 1, 'b': 9999999999}) }}",
    "{{ '{:{b[0]}}'.format(1, b=[9999999999]) }}",
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ range(100000) | join('b' * 100000) }}",
    "{{ ('b' * 100000).join(range(100000) | map('string')) }}",
    "{{ ('\n' * 1000000) | indent(10000) }}",
    growing("'a'", "n.s ~ n.s"),
    growing("'a'", "n.s + n.s"),
    growing("'a'", "[n.s, n.s] | join"),
    growing("[1]", "n.s + n.s"),
    growing("[1]", "[n.s, n.s]", "{{ n.s }}"),
    growing("[1]", "[n.s, n.s]", "{{ n.s ~ '' }}"),
    growing("[1]", "[n.s, n.s]", "{{ n.s | tojson }}"),
    growing("[1]", "[n.s, n.s]", "{{ n.s | string }}"),
    growing("[1]", "{'a': n.s, 'b': n.s}", "{{ n.s }}"),
    "{% set a = 'a' * 100000000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "{% macro f() %}{% for i in range(9) %}{{ 'a' * 9999999 }}{% endfor %}{% endmacro %}{{ f() ~ f() }}",
]
LEAVING = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='assistant') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% include 'x' %}",
    "{% import '/etc/passwd' as x %}",
    "{{ lipsum(n=5) }}",
]
LOST = [
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
]


@pytest.mark.parametrize("template", [*RUNNING, *WRITING, *LEAVING, *LOST])
def test_it_is_refused_in_time_and_memory(template: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_metadata(template=template), Path("small.gguf"))
    begun = time.thread_time()
    with pytest.raises(TemplateError, match=r"refused by the model's chat template|no Jinja"):
        render(tokenizer, TALK, reply=True)
    assert time.thread_time() - begun < 2 * sandbox.SECONDS


def test_memory_is_bounded() -> None:
    """All of them once more, where a gigabyte and a half is all there is."""
    resource = pytest.importorskip("resource")
    code = (
        "import json, sys; from herdbook.tokens import sandbox\n"
        "for one in json.load(sys.stdin):\n"
        "    try: sandbox.render(sandbox.compile(one), {'messages': []})\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([*RUNNING, *WRITING]),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29)),
    )
    told = done.stdout.splitlines()
    assert len(told) == len(RUNNING) + len(WRITING)
    assert {line.split(" than ")[0] for line in told} == {
        "SecurityError it runs for more",
        "SecurityError it writes more",
    }


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ messages | attr('__class__') | attr('__mro__') | first }}",
        "{{ self.__init__ }}",
        "{% for i in range(2) recursive %}{{ loop.__class__ }}{% endfor %}",
    ],
)
def test_what_is_out_of_reach_is_nothing(template: str) -> None:
    assert written(template) == ""


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for i in range(3) %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}",
         "1/3False 2/3False 3/3True "),
        ("{% for i in 'ab' if i == 'b' %}{{ loop.length }}{{ i }}{% else %}none{% endfor %}", "1b"),
        ("{% for i in nothing %}x{% else %}none{% endfor %}", "none"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for m in messages recursive %}{{ m.content }}{% endfor %}", "hi"),
        ("{{ messages | map(attribute='content') | first }}", "hi"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}", "AB"),
        ("{% macro f(x) %}<{{ caller(x) }}>{% endmacro %}{% call(y) f('a') %}{{ y }}{% endcall %}",
         "<a>"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x ~ 'b' ~ 2 }}", "a1b2"),
        ("{{ 'abc'[1:] }}{{ messages[:1] | length }}{{ 7 % 4 }}{{ '%s-%d' % ('a', 1) }}", "bc13a-1"),
        ("{{ 2 ** 10 }}{{ 'ab' * 2 }}{{ '%03d' | format(5) }}{{ '{:>3}'.format(5) }}", "1024abab005  5"),
        ("{{ '{}!'.format('9999999999 {*}') }}{{ '%s' % '9999999999 *' }}", "9999999999 {*}!9999999999 *"),
        ("{{ {'b': [1, 'é']} | tojson }}", '{"b": [1, "é"]}'),
        ("{{ 'a' | indent(2, first=true) }}{{ 'a-b'.replace('-', '+') }}", "  aa+b"),
        ("{{ namespace(a='x' * 1000, b='y' * 1000).a | length }}", "1000"),
    ],
)  # fmt: skip
def test_ordinary_programs_are_left_alone(template: str, text: str) -> None:
    assert written(template) == text


def test_a_long_conversation_has_room() -> None:
    talk = [{"role": "user", "content": "word " * 2000}] * 500  # 5 million characters
    source = "{% for m in messages %}{{ '[' ~ m.role ~ ']' + m.content | trim ~ '\n' }}{% endfor %}"
    begun = time.thread_time()
    assert len(sandbox.render(sandbox.compile(source), {"messages": talk})) > 4_900_000
    assert time.thread_time() - begun < sandbox.SECONDS / 2


def test_each_rendering_has_its_own_budget() -> None:
    program = sandbox.compile("{% for i in range(40) %}{{ 'a' * 1000000 }}{% endfor %}")
    for _ in range(3):
        assert len(sandbox.render(program, {})) == 40_000_000


def test_a_constant_of_a_template() -> None:
    assert sandbox.constant("text {% set a = [1, 'b'] %}{% set a = 2 %}", "a") == [1, "b"]
    assert sandbox.constant("{% if x %}{% set a = 1 %}{% endif %}", "a") is None
    assert sandbox.constant("{% set a = b %}", "a") is None
    assert sandbox.constant("{% set %}", "a") is None
