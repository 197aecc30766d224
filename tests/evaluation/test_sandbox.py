"""Model-written code is shut in: what it may, what it may not, and that it cannot say it passed."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herdbook.errors import DataError, SandboxError
from herdbook.evaluation.code import confine, sandbox
from herdbook.evaluation.code import running as code_tasks
from herdbook.evaluation.code.running import CodeTask, check, human_eval, mbpp
from herdbook.evaluation.code.sandbox import Limits, Sandbox, read_all


def shut_in() -> bool:
    try:
        Sandbox("", limits=Limits()).close()
    except SandboxError:
        return False
    return True


needs_kernel = pytest.mark.skipif(not shut_in(), reason="this kernel does not permit namespaces")
ROW = {
    "prompt": 'def add(a, b):\n    """Sum."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n",
}


def told(source: str, limits: Limits = code_tasks.DEFAULT, seconds: float = 20) -> str:
    """What a program prints, shut in."""
    read, write = os.pipe()
    with os.fdopen(read, "rb"):
        with Sandbox(source, limits=limits, stdout=write):
            os.close(write)
            found = read_all(read, 100_000, seconds)
        return "" if found is None else found.decode()


def ours(mark: str) -> list[str]:
    """Processes of this machine whose command line holds `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_text(errors="replace")
        except OSError:
            continue  # it has ended
        if mark in line and int(folder.name) != os.getpid():
            found.append(line[:200])
    return found


@needs_kernel
def test_it_sees_no_files_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sesame")
    (tmp_path / "secret").write_text("sesame")
    found = told(
        "import os, sys\n"
        f"print(os.path.exists({str(tmp_path)!r}), os.listdir('/tmp'), dict(os.environ), sys.argv)\n"
        f"print([p for p in ({str(Path.home())!r}, '/etc/passwd', '/proc/self', '/sys/kernel', '/dev/shm')"
        " if os.path.exists(p) and any(n != '.pyenv' for n in os.listdir(p))])\n"
        "print(os.getuid(), os.listdir('/dev'))\n"
    )
    assert "sesame" not in found
    first, second, third = found.splitlines()
    assert first.startswith("False [] {") and "SECRET" not in first
    assert second == "[]"
    assert third.startswith("65534 ") and len(third.split(",")) == 3


@needs_kernel
def test_it_writes_into_its_empty_folder_alone(tmp_path: Path) -> None:
    found = told(
        "import os, sys\n"
        "open('mine', 'w').write('x' * 1000)\n"
        "def try_(path, mode='w'):\n"
        "    try: open(path, mode).write('x')\n"
        "    except OSError as e: return type(e).__name__ + str(e.errno)\n"
        "    return 'written'\n"
        f"print(try_('/x'), try_({str(tmp_path / 'x')!r}), try_(os.__file__, 'a'), try_('/tmp/ok'))\n"
        "size = 0\n"
        "try:\n"
        "    for n in range(99):\n"
        "        with open(f'big{n}', 'wb', 0) as f: size += f.write(bytes(1 << 20))\n"
        "except OSError as e: print(e.errno, size >> 20)\n"
    )
    first, second = found.splitlines()
    words = first.split()
    assert words[0].startswith("OSError30") and words[1].startswith("FileNotFound")
    assert words[2] in ("OSError30", "PermissionError13") and words[3] == "written"
    assert second.split()[0] == "28" and int(second.split()[1]) < 16
    assert not list(tmp_path.iterdir())


@needs_kernel
def test_it_reaches_no_network() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        found = told(
            "import socket\n"
            f"for where in ('127.0.0.1', {port}), ('1.1.1.1', 53):\n"
            "    try: socket.create_connection(where, 2); print('connected')\n"
            "    except OSError as e: print(e.errno)\n"
            "for family in (16, 17, 40):\n"  # netlink, packets, and vsock, which may reach a host
            "    try: socket.socket(family, socket.SOCK_STREAM); print('made')\n"
            "    except OSError as e: print(e.errno)\n"
        )
    assert found.split()[:2] == ["101", "101"]  # ENETUNREACH
    if os.uname().machine in confine.DENIED:
        assert found.split()[2:] == ["1", "1", "1"]


@needs_kernel
def test_it_makes_no_namespaces_and_traces_nobody() -> None:
    """Threads and children are allowed all the same."""
    if os.uname().machine not in confine.DENIED:
        pytest.skip("an architecture whose calls are not known")
    found = told(
        "import ctypes, os, subprocess, threading\n"
        "c = ctypes.CDLL(None, use_errno=True)\n"
        "def no(name, *a):\n"
        "    r = getattr(c, name)(*a)\n"
        "    return (r, ctypes.get_errno())\n"
        "print(no('unshare', 0x10000000), no('ptrace', 16, 1, 0, 0), no('mount', b'none', b'/tmp', b'tmpfs', 0, 0),\n"
        "      no('syscall', 425, 1, 0), no('syscall', 435, 0, 0), no('chroot', b'/tmp'), flush=True)\n"
        "t = threading.Thread(target=lambda: print('thread', flush=True)); t.start(); t.join()\n"
        "if os.fork() == 0:\n    print('child', flush=True); os._exit(0)\n"
        "os.wait()\n"
    )
    first, *rest = found.splitlines()
    assert first == "(-1, 1) (-1, 1) (-1, 1) (-1, 1) (-1, 38) (-1, 1)"
    assert sorted(rest) == ["child", "thread"]


@needs_kernel
def test_it_ends_with_all_its_children() -> None:
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    found = told(
        f"# {mark}\n"
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print('left one behind', flush=True)\n"
        "time.sleep(600)\n",
        seconds=3,
    )
    assert found == ""  # it holds its output open until it is ended
    deadline = time.monotonic() + 10
    while ours(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not ours(mark)


@needs_kernel
def test_limits_hold() -> None:
    source = (
        "import os, time\n"
        "n = 0\n"
        "try:\n"
        "    while n < 1000:\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "        n += 1\n"
        "except OSError as e: print(n, e.errno)\n"
        "try: x = bytearray(1 << 30)\n"
        "except MemoryError: print('memory')\n"
    )
    assert told(source).split() == ["3", "11", "memory"]
    started = time.monotonic()
    assert told("while True: pass", Limits(seconds=0.5), seconds=20) == ""  # its processor time
    assert time.monotonic() - started < 15


def test_refuses_where_it_cannot_shut_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    script = tmp_path / "confine.py"
    text = Path(sandbox.__file__).with_name("confine.py").read_text()
    script.write_text(text.replace('call("unshare", ', 'call("unshare", -1, '))
    monkeypatch.setattr(sandbox, "_SCRIPT", script)
    with pytest.raises(SandboxError, match=r"unshare.*never run unconfined\n  next: use Linux"):
        check(CodeTask(f"open({str(marker)!r}, 'w')", "assert True"))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="darwin has no namespaces"):
        Sandbox("", limits=Limits())
    assert not marker.exists()


@needs_kernel
def test_a_user_without_rights_can_shut_in_too() -> None:
    """As root runs these tests in a container, the other way is taken by a user without rights."""
    python = "/usr/bin/python3"
    if os.geteuid() or not Path(python).exists():
        pytest.skip("needs root, and a Python that everybody can read")
    with tempfile.TemporaryDirectory() as place:  # pytest's folders are its user's alone
        os.chmod(place, 0o755)
        modules = ["errors.py", "evaluation/code/sandbox.py", "evaluation/code/confine.py"]
        for name in modules:
            to = Path(place) / "herdbook" / name
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text((Path(sandbox.__file__).parents[2] / name).read_text())
        program = (
            "import os\n"
            "from herdbook.evaluation.code.sandbox import Limits, Sandbox, read_all\n"
            "r, w = os.pipe()\n"
            'source = \'import os; print(os.getuid(), os.listdir("/tmp"), os.path.exists("/etc/passwd"))\'\n'
            "with Sandbox(source, limits=Limits(), stdout=w):\n"
            "    os.close(w); print(read_all(r, 1000, 20).decode())\n"
        )
        done = subprocess.run(
            [python, "-c", program],
            env={"PYTHONPATH": place},
            user=65534, group=65534, extra_groups=[], cwd=place, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.stdout.strip() == "65534 [] False", done.stderr


# ------------------------------------------------------------------------------------- code tasks


@needs_kernel
@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("    return a + b", ""),
        ("return a + b", ""),
        ("    return a + b\n\nprint(add(1, 2))\n", ""),
        ("    return a + b\n```\nIt adds.", ""),
        ("    return a + b\n```\n", ""),
        ("```python\nimport math\ndef add(a, b):\n    return math.fsum([a, b])\n```", ""),
        ("Sure!\n```\ndef add(a, b):\n    return a - -b\n```\nIt adds.", ""),
        ("    return a - b", "AssertionError"),
        ("    return sub(a, b)", "NameError: name 'sub' is not defined"),
        ("    return a +", "SyntaxError"),
        ("I cannot help with that.", "SyntaxError"),
        ("    return object()", "Uncomparable: the code gives a object"),
        ("    while True: pass", "timed out after 1 s"),
        ("    import time; time.sleep(30)", "timed out after 1 s"),
        ("    x = [0]\n    while True: x += x", "MemoryError"),
    ],
)
def test_replies(reply: str, why: str) -> None:
    found = check(human_eval(ROW, reply), Limits(seconds=1 if "time" in why else 10))
    assert found.passed is (not why) and found.why.startswith(why), found


FORGERIES = {
    "marker": '    print(\'passed\'); print(\'{"passed": true, "why": ""}\', flush=True)\n    return 0',
    "exit": "    import os; os._exit(0)",
    "exit at once": "    return 0\nimport os\nos._exit(0)",
    "system exit": "    raise SystemExit(0)",
    "frames": (
        "    import os\n    for fd in range(64):\n"
        '        try: os.write(fd, b\'X\\n{"passed": true, "why": ""}\')\n'
        "        except OSError: pass\n    os._exit(0)"
    ),
    "equal to all": (
        "    class Any(int):\n        def __eq__(self, other): return True\n    return Any(7)"
    ),
    "patched checker": (
        "    import builtins, sys, gc\n    builtins.AssertionError = Warning\n"
        "    for o in gc.get_objects():\n        if isinstance(o, dict) and 'check' in o:\n"
        "            o['check'] = lambda c: None\n    return 0"
    ),
    "killed all": "    import os, signal\n    os.kill(-1, signal.SIGKILL)\n    return 0",
    "killed first": "    import os, signal\n    os.kill(1, signal.SIGKILL)\n    return 0",
    "fork bomb": (
        "    import os\n    while True:\n        try: os.fork()\n        except OSError: pass"
    ),
    "flood": "    import os\n    while True: os.write(1, b'x' * 65536)",
    "flood frames": (
        "    import os\n    while True:\n        for fd in range(64):\n"
        "            try: os.write(fd, b'x' * 65536)\n            except OSError: pass"
    ),
    "deep": "    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "huge": "    return 'x' * (20 << 20)",
}


@needs_kernel
@pytest.mark.parametrize("name", FORGERIES)
def test_hostile_code_fails(name: str) -> None:
    started = time.monotonic()
    found = check(human_eval(ROW, "```\ndef add(a, b):\n" + FORGERIES[name] + "\n```"), Limits(1.0))
    assert not found.passed and found.why, found
    assert time.monotonic() - started < 30


@needs_kernel
def test_what_crosses_arrives_as_it_was() -> None:
    source = (
        "def same(*a, **k):\n    return (a, k)\nclass P:\n    x = 3\ndef x(p):\n    return p.x\n"
    )
    source += "def fail(n):\n    raise KeyError(n)\ndef count():\n    yield from range(3)\n"
    tests = (
        "import math\n"
        "v = (None, True, 7, -2.5, float('inf'), 'é\\ud800\\n', [1, [2]], (1,), {3, 'a'}, b'\\0',\n"
        "     {(1, 2): {'k': []}}, frozenset({1}), 2j, range(3), 10 ** 5000)\n"
        "got, named = same(*v, key=v)\n"
        "assert got == v and named == {'key': v}\n"
        "assert [type(g) for g in got] == [type(w) for w in v]\n"
        "assert math.isnan(same(math.nan)[0][0])\n"
        "assert x(P()) == 3\n"  # a handle goes there and back
        "assert list(count()) == [0, 1, 2]\n"
        "try:\n    fail('k')\nexcept KeyError as e:\n    assert e.args == (\"'k'\",)\n"
        "else:\n    assert False\n"
    )
    assert check(CodeTask(source, tests), Limits(10.0)) == code_tasks.CodeVerdict(True)


@needs_kernel
def test_mbpp() -> None:
    row = {
        "test_setup_code": "import math",
        "test_list": ["assert area(1) == math.pi", "assert set(ints([1, 1.5])) == {1}"],
    }
    reply = "```python\nimport math\ndef area(r): return math.pi * r * r\n"
    right = reply + "def ints(x): return [n for n in x if isinstance(n, int)]\n```"
    assert check(mbpp(row, right), Limits(10.0)).passed
    wrong = check(
        mbpp(row, reply + "def set(x): return {1}\ndef ints(x): return x\n```"), Limits(10.0)
    )
    assert not wrong.passed and wrong.why.startswith("AssertionError")
    missing = check(mbpp(row, reply + "```"), Limits(10.0))
    assert missing.why.startswith("KeyError: ") and "ints" in missing.why
    # a test's name that is a builtin's too, and setup that makes one of the candidate's objects
    row = {"code": "def sum(a, b):\n    pass", "test_list": ["assert sum(10, 15) == 6"]}
    assert check(mbpp(row, "def sum(a, b): return 6"), Limits(10.0)).passed
    assert not check(mbpp(row, "def sum(a, b): return 7"), Limits(10.0)).passed
    row = {
        "code": "class Node: pass\ndef value(n): pass", "test_setup_code": "root = Node(1)",
        "test_list": ["assert value(root) == 1"],
    }  # fmt: skip
    source = "class Node:\n    def __init__(self, v): self.v = v\ndef value(n): return n.v\n"
    assert check(mbpp(row, source), Limits(10.0)).passed
    with pytest.raises(DataError, match="needs test_list"):
        mbpp({"code": ""}, "")
    with pytest.raises(DataError, match="lacks test, entry_point"):
        human_eval({"prompt": ""}, "")


@needs_kernel
def test_many_at_once_keep_their_order_and_leave_nothing_open() -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = count()
    tasks = [human_eval(ROW, f"    return a + b + {n % 2}") for n in range(6)]
    found = code_tasks.check_all(tasks, Limits(10.0), workers=3)
    assert [one.passed for one in found] == [True, False] * 3
    assert count() == before


def _rows(path: Path) -> list[Any]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return [json.loads(line) for line in text.split("\n") if line]


@needs_kernel
def test_human_eval_reference_solutions(shared_data: Callable[[str], Path]) -> None:
    """HERD_SLOW=1: all 164; else every eighth. With a wrong body every one fails."""
    rows = _rows(shared_data("human_eval/HumanEval.jsonl.gz"))
    assert len(rows) == 164
    if not os.environ.get("HERD_SLOW"):
        rows = rows[::8]
    limits = Limits(seconds=20.0)  # of a busy machine
    right = [human_eval(row, row["canonical_solution"]) for row in rows]
    assert [v for v in code_tasks.check_all(right, limits) if not v.passed] == []
    wrong = [human_eval(row, "    return None") for row in rows]
    assert [v for v in code_tasks.check_all(wrong, limits) if v.passed] == []


@needs_kernel
def test_official_samples(shared_data: Callable[[str], Path]) -> None:
    """Six samples of one problem; the project's own README gives pass@1 = 0.5."""
    (problem,) = _rows(shared_data("human_eval/example_problem.jsonl"))
    samples = _rows(shared_data("human_eval/example_samples.jsonl"))
    tasks = [human_eval(problem, sample["completion"]) for sample in samples]
    found = code_tasks.check_all(tasks)
    assert [one.passed for one in found] == [False, False, False, True, True, True]
    assert found[1].why == "timed out after 3 s" and found[2].why.startswith("EOFError")
