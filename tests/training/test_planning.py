"""The planner's arithmetic against what torch really holds, and what a refusal says."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from raising import stock, tune

from herdbook.book.book import Book
from herdbook.errors import CapacityError
from herdbook.model.checkpoint import open_checkpoint
from herdbook.model.layout import Packed
from herdbook.progress import Progress
from herdbook.training import fitting, memory, methods, planning, state
from herdbook.training import optimiser as optimisers
from herdbook.training import state as states
from herdbook.training.activations import Load, activations
from herdbook.training.planning import Disk

LOAD = Load((9, 5, 9, 4), trained=12, several=False)
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.0},
    "dropout": {"dropout": 0.1, "last_layers": 1},
    "nf4": {"dropout": 0.0, "base": "nf4"},
    "full": {"method": "full"},
    "bfloat16": {"method": "full", "precision": "bfloat16"},
    "freeze": {"method": "freeze", "last_layers": 1},
    "ia3": {"method": "ia3"},
    "prefix": {"method": "prefix", "virtual_tokens": 3},
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Book:
    book, _, _ = stock(tmp_path_factory.mktemp("home"), tiny_folder)
    return book


@pytest.mark.parametrize("way", WAYS)
def test_weights_and_activations_are_those_that_torch_holds(way: str, tiny_folder: Path):
    how = tune(**WAYS[way])
    decoder = planning.lay_out(open_checkpoint(tiny_folder), how)
    methods.prepare(decoder, how)
    source: Any = SimpleNamespace(path=tiny_folder, ref="tiny")
    real = how._load(source, planning.dtype_of(how))
    methods.prepare(real, how)

    def held(one: torch.nn.Module) -> int:
        return sum(w.nbytes for w in (*one.parameters(), *one.buffers()))

    assert held(decoder) == held(real) > 0

    own = {w.untyped_storage().data_ptr() for w in (*real.parameters(), *real.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage()._cdata] = x
        return x

    ids = torch.zeros(LOAD.tokens, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = real(ids, Packed(LOAD.lengths))
    really = sum(one.untyped_storage().nbytes() for one in kept.values()) + hidden.nbytes
    counted, _ = activations(decoder, LOAD)
    assert counted == pytest.approx(really, rel=0.02, abs=ids.nbytes)


@pytest.mark.parametrize("name", ["adamw", "adamw8", "lion", "adafactor"])
def test_optimiser_states_are_those_that_torch_holds(name: str):
    weights = {
        one: torch.nn.Parameter(torch.randn(shape))
        for one, shape in {"matrix": (80, 70), "small": (6, 5), "norm": (9,)}.items()
    }
    optimiser = optimisers.make(
        name, weights, learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.0
    )
    for one in weights.values():
        one.grad = torch.randn_like(one)
    optimiser.step()
    optimisers.average(optimiser, 0.9)
    really = sum(
        value.nbytes
        for state in optimiser.state.values()
        for key, value in state.items()
        if key != "step"
    )
    assert planning._state_bytes(tune(optimiser=name, average=0.9), weights) == really


def test_recompute_keeps_what_enters_the_blocks(tiny_folder: Path):
    checkpoint = open_checkpoint(tiny_folder)
    long = Load((400,) * 4, 1600, several=True)
    whole = planning.memory_of(checkpoint, tune(dropout=0.0), long, 0)
    thin = planning.memory_of(checkpoint, tune(dropout=0.0, recompute=True), long, 0)
    assert thin.activations < whole.activations and thin.weights == whole.weights
    bound = planning.memory_of(checkpoint, tune(dropout=0.0), long, 0, rough=True)
    assert bound.peak > whole.peak


def test_a_run_that_does_not_fit_is_refused_before_it_loads(
    shelf: Book, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match=r"needs about .* GB|MB") as caught:
        tune(seed=7).run(shelf)
    assert "weights" in str(caught.value) or "work" in str(caught.value)
    assert "HERDBOOK_FIT=0 begins all the same" in str(caught.value)
    monkeypatch.setenv("HERDBOOK_FIT", "0")
    assert tune(seed=7, steps=1).run(shelf).kind == "adapter"


def test_the_nearest_settings_that_fit_are_named(tiny_folder: Path):
    checkpoint = open_checkpoint(tiny_folder)
    load, how = Load((64,) * 200, 6000, several=True), tune(method="full", pack=12_800)
    needed = planning.memory_of(checkpoint, how, load, 0)
    freer = planning.memory_of(checkpoint, replace(how, recompute=True), load, 0)
    with pytest.raises(CapacityError) as caught:
        fitting.refuse(checkpoint, how, load, needed, room=freer.peak)
    assert "--tune.recompute true " in caught.value.next
    fitting.refuse(checkpoint, how, load, needed, room=needed.peak)
    found = fitting.nearest_fit(checkpoint, how, load, 0, room=freer.peak - 1)
    assert found is not None and found[1].peak < freer.peak and found[0] != {"recompute": True}
    assert fitting.nearest_fit(checkpoint, how, load, 0, room=10) is None
    for room in range(freer.peak - 1, 10, -(freer.peak // 20)):  # what Tune refuses is not proposed
        for processes in (1, 2):
            found = fitting.nearest_fit(checkpoint, how, load, 0, room, processes)
            assert processes == 1 or found is None or "offload" not in found[0]


def test_what_a_killed_save_left_is_removed(tmp_path: Path):
    (tmp_path / ".state-000000010.tmp").mkdir()
    (tmp_path / ".state-000000010.tmp" / "part").write_bytes(b"x")
    (tmp_path / ".state.safetensors.123.tmp").write_bytes(b"x")
    (tmp_path / "state.safetensors").write_bytes(b"x")
    states.clear(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_disk_without_room(tmp_path: Path):
    fitting.need_disk(Disk(1, 1), tmp_path)
    with pytest.raises(CapacityError, match="of disk"):
        fitting.need_disk(Disk(10**18, 1), tmp_path)


def test_a_state_that_is_there_is_not_counted_again(tmp_path: Path):
    """Of the two states that lie there for a moment, one may be what an earlier start left."""
    needed = Disk(result=100, states=2 * 400)
    with pytest.raises(CapacityError, match="900 MB"):
        fitting.need_disk(Disk(10**8, 8 * 10**8), tmp_path, free=5 * 10**8 - 1)
    fitting.need_disk(needed, tmp_path, free=500, there=400)
    fitting.need_disk(needed, tmp_path, free=500, there=900)  # of another run, or of two
    with pytest.raises(CapacityError):
        fitting.need_disk(needed, tmp_path, free=499, there=400)


def test_a_run_that_goes_on_needs_less_disk(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    book, _, _ = stock(tmp_path, tiny_folder)
    how = tune(method="full", steps=4, dropout=0.0)
    with pytest.raises(KeyboardInterrupt):
        how.run(book, progress=Stop())
    (saved,) = book.home.rglob(state.NAME)
    needed = planning.disk_of(open_checkpoint(tiny_folder), how)
    assert needed.states // 2 < saved.stat().st_size < needed.states
    left = SimpleNamespace(free=needed.result + needed.states // 2)
    monkeypatch.setattr(fitting.shutil, "disk_usage", lambda place: left)
    assert how.run(book).metrics["steps"] == 4


class Stop(Progress):
    """Presses Ctrl-C in the third step."""

    packs = 0

    @contextmanager
    def task(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Any]:
        yield self

    def advance(self, amount: float, **notes: float) -> None:
        self.packs += 1
        if self.packs == 3:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "tp:2", "fsdp+tp:2", "pp:2"])
def test_several_processes_hold_their_shares(how: str, tiny_folder: Path):
    checkpoint, load = open_checkpoint(tiny_folder), Load((64,) * 4, 60, several=True)
    step = tune(method="full", dropout=0.0, parallel=how)
    alone = planning.memory_of(checkpoint, step, load, 0)
    each = planning.memory_of(checkpoint, step, load, 0, processes=4)
    shares = {"ddp": 1, "fsdp": 4, "tp:2": 1, "fsdp+tp:2": 2, "pp:2": 2}[how]
    for part in ("gradients", "optimiser"):
        mine, whole = getattr(each, part), getattr(alone, part)
        assert mine <= whole // shares
        assert mine > whole // shares // 2  # in tp, embedding and norms are whole
    sharded = "fsdp" in how or "tp" in how
    assert (each.weights < alone.weights) == sharded
    assert each.activations == alone.activations // (2 if how == "pp:2" else 1)
    assert planning.memory_of(checkpoint, step, load, 0, processes=1) == alone


def test_all_load_the_whole_model_first(tiny_folder: Path):
    checkpoint, load = open_checkpoint(tiny_folder), Load((9,), 3, several=False)
    step = tune(method="full", optimiser="lion", dropout=0.0, parallel="fsdp")
    each = planning.memory_of(checkpoint, step, load, 10**9, processes=64)
    whole = planning.memory_of(checkpoint, step, load, 10**9)
    assert each.peak >= 10**9 + whole.weights


def test_disk_is_what_lies_there(shelf: Book, tiny_folder: Path):
    how = tune(method="full", steps=2, dropout=0.0)
    made = how.run(shelf)
    needed = planning.disk_of(open_checkpoint(tiny_folder), how)
    weights = (made.path / "model.safetensors").stat().st_size
    assert needed.result == pytest.approx(weights, rel=0.05)
    assert needed.states == 2 * 3 * needed.result


def test_a_control_group_s_limit_counts(tmp_path: Path):
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert memory.free_bytes(tmp_path) == 8000 * 1024
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/b/memory.current", "10\n")
    assert memory.free_bytes(tmp_path) == 8000 * 1024
    write("sys/fs/cgroup/a/memory.max", "5000\n")
    write("sys/fs/cgroup/a/memory.current", "4000\n")
    write("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 300\n")
    assert memory.free_bytes(tmp_path) == 1300
    write("proc/self/cgroup", "5:cpu,memory:/x\n")
    write("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "700\n")
    write("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "600\n")
    assert memory.free_bytes(tmp_path) == 100
    shutil.rmtree(tmp_path / "sys")
    assert memory.free_bytes(tmp_path) == 8000 * 1024
    json.dumps(memory.held_bytes())
