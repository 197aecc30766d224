"""Pickled weights: plain tensors are found where torch finds them; what is more than that never runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.errors import FileError
from herdbook.files.pickles import LEGACY_MAGIC, PICKLE_LIMIT_BYTES, read_table
from herdbook.model.checkpoint.weights import DTYPES, Part, PlainWeights


def save(value: Any, path: Path, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    weights = PlainWeights({name: [Part(path, entry)] for name, entry in read_table(path).items()})
    return {name: weights.read(name, weights.dtype(name)) for name in weights.shapes}


DTYPE = st.sampled_from(
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
SHAPE = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def states(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """State dicts as they occur: own tensors, views of one storage, transposed ones, tied ones."""
    state: dict[str, torch.Tensor] = OrderedDict()
    for i in range(draw(st.integers(0, 4))):
        whole = torch.randn([2 + n for n in draw(SHAPE)] or [3]).to(draw(DTYPE))
        kind = draw(st.sampled_from(["own", "slice", "transposed", "parameter", "scalar", "empty"]))
        state[f"layers.{i}.weight"] = {
            "own": whole,
            "slice": whole[1:],
            "transposed": whole.transpose(0, -1),
            "parameter": torch.nn.Parameter(whole, requires_grad=False),
            "scalar": whole.flatten()[1],
            "empty": whole[:0],
        }[kind]
        if draw(st.booleans()):
            state[f"tied.{i}"] = state[f"layers.{i}.weight"]
    return state


@given(state=states(), legacy=st.booleans())
@settings(max_examples=100, deadline=None)
def test_values_are_those_that_torch_reads(
    state: dict[str, torch.Tensor], legacy: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = save(state, tmp_path_factory.mktemp("p") / "m.bin", legacy=legacy)
    theirs = torch.load(path, weights_only=True)
    ours = read(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor.data)


def test_a_modules_own_state_with_what_torch_pins_to_it(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).half()
    for legacy in (False, True):
        path = save(module.state_dict(), tmp_path / "m.bin", legacy=legacy)
        for name, tensor in read(path).items():
            assert torch.equal(tensor, module.state_dict()[name])


# --- hostile ones ---


class Runs:
    """Runs a command when it is unpickled by a reader that runs what it is told."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("call", ["os.system", "builtins.exec", "builtins.eval", "torch.load"])
def test_code_does_not_run(call: str, legacy: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    arguments: dict[str, tuple[Any, ...]] = {
        "os.system": (os.system, f"touch {trace}"),
        "builtins.exec": (exec, f"import os; os.mkdir({str(trace)!r})"),
        "builtins.eval": (eval, f"__import__('os').mkdir({str(trace)!r})"),
        "torch.load": (torch.load, str(trace)),
    }
    hostile = Runs(*arguments[call])
    path = save({"a": torch.ones(2), "b": hostile}, tmp_path / "m.bin", legacy=legacy)
    with pytest.raises(FileError, match=r"it asks for .* nothing of it was run") as caught:
        read_table(path)
    assert not trace.exists() and "safetensors" in caught.value.next
    if call != "torch.load":
        torch.load(path, weights_only=False)
        assert trace.exists(), "the file is as dangerous as the test says"


def program(*commands: bytes) -> bytes:
    return b"\x80\x02" + b"".join(commands) + b"."


def call(name: str) -> bytes:
    module, _, leaf = name.rpartition(".")
    return f"c{module}\n{leaf}\n".encode()


def number(n: int) -> bytes:
    raw = n.to_bytes(20, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def zipped(path: Path, pickled: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        for name, data in members.items():
            archive.writestr(f"m/data/{name}", data)
    return path


def tensor(values: int, offset: int, shape: list[int], strides: list[int], key: str = "a") -> bytes:
    """{"x": a tensor of F32}."""
    numbers = [b"(" + b"".join(map(number, some)) + b"t" for some in (shape, strides)]
    storage = (
        *(b"(", text("storage"), call("torch.FloatStorage"), text(key), text("cpu")),
        *(number(values), b"tQ"),
    )
    rebuilt = (
        *(call("torch._utils._rebuild_tensor_v2"), b"(", *storage, number(offset), *numbers),
        *(b"\x89", call("collections.OrderedDict"), b")R", b"tR"),
    )
    return program(b"}", text("x"), *rebuilt, b"s")


def test_the_handmade_program_is_a_right_one(tmp_path: Path) -> None:
    values = torch.arange(8.0)
    path = zipped(tmp_path / "m.bin", tensor(8, 2, [2, 3], [3, 1]), a=values.numpy().tobytes())
    assert torch.equal(read(path)["x"], values[2:].view(2, 3))


HOSTILE: dict[str, tuple[bytes, str]] = {
    # torch's own restricted reader obeys the first two
    "a large array": (
        program(call("builtins.bytearray"), number(10**12), b"\x85R"),
        "it asks for builtins.bytearray",
    ),
    "a large tensor": (
        program(call("torch.FloatTensor"), number(10**10), b"\x85R"),
        "it asks for torch.FloatTensor",
    ),
    "changing our reader": (
        program(
            call("torch._utils._rebuild_tensor_v2"),
            *(b"N}", text("__defaults__"), b"(N", b"ts", b"\x86b"),
        ),
        "it changes <function",
    ),
    "calling what it holds": (program(text("x"), b")R"), "it calls 'x'"),
    "a new object": (program(call("collections.OrderedDict"), b")\x81"), "the command NEWOBJ"),
    "a name from the stack": (program(text("os"), text("system"), b"\x93"), "STACK_GLOBAL"),
    "an extension": (program(b"\x82\x01"), "the command EXT1"),
    "a huge text": (program(b"\x8d" + struct.pack("<Q", 2**62)), "the command BINUNICODE8"),
    "a huge memo": (program(b"}", b"r" + b"\xff" * 4), ""),
    "cut off": (b"\x80\x02}X\xff\xff", "its pickle is broken"),
    "popping nothing": (program(b"a"), "its pickle is broken"),
    "no command": (program(b"\xfe"), "the command 254"),
    "deep lists": (program(b"]" * 100_000, b"a" * 99_999), "it holds a list, no dictionary"),
    "a list": (program(b"]"), "it holds a list, no dictionary"),
    "a number": (program(b"}", text("x"), b"K\1s"), "'x' is a int, not a tensor"),
    "a nested dictionary": (program(b"}", text("x"), b"}s"), "'x' is a _?dict, not a tensor"),
    "no name": (program(b"}", b"K\1K\1s"), "1 is a int, not a tensor"),
    "another persistent thing": (program(b"}", text("storage"), b"Q"), "its pickle is broken|asks"),
    "values that are not there": (tensor(8, 0, [8], [1], key="b"), "'x' has no values"),
    "more values than bytes": (tensor(9, 0, [9], [1]), "should have 36 bytes, it has 32"),
    "past the end": (tensor(8, 7, [2], [1]), "does not lie in its 8 values"),
    "past the end by strides": (tensor(8, 0, [2, 2], [7, 1]), "does not lie in its 8 values"),
    "more than there is": (tensor(8, 0, [2**40, 2**40], [0, 0]), "does not lie in its 8 values"),
    "past 64 bits": (tensor(8, 0, [2**63], [1]), "has offset, shape and strides"),
    "negative": (tensor(8, -1, [2], [1]), "has offset, shape and strides"),
    "negative shape": (tensor(8, 0, [-2], [1]), "has offset, shape and strides"),
    "negative strides": (tensor(8, 4, [2], [-1]), "has offset, shape and strides"),
    "too many axes": (tensor(8, 0, [1] * 9, [1] * 9), "has offset, shape and strides"),
    "shape without strides": (tensor(8, 0, [2, 2], [1]), r"has the shape \(2, 2\)"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_programs_are_refused(case: str, tmp_path: Path) -> None:
    pickled, reason = HOSTILE[case]
    path = zipped(tmp_path / "m.bin", pickled, a=bytes(32))
    if not reason:
        assert read_table(path) == {}
        return
    with pytest.raises(FileError, match=reason) as caught:
        read_table(path)
    assert caught.value.next


def test_the_reader_is_the_same_after_a_hostile_file(tmp_path: Path) -> None:
    for case, (pickled, _) in HOSTILE.items():
        path = zipped(tmp_path / f"{len(case)}.bin", pickled, a=bytes(32))
        try:
            read_table(path)
        except FileError:
            continue
    test_the_handmade_program_is_a_right_one(tmp_path)


def test_hostile_zips(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    good = tensor(8, 0, [8], [1])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", good)
    with pytest.raises(FileError, match=r"'m/data.pkl' is compressed or encrypted"):
        read_table(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("m/data.pkl", good)
    with pytest.raises(FileError, match="damaged or comes twice"):
        read_table(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", good)
        archive.writestr("b/data.pkl", good)
    with pytest.raises(FileError, match=r"holds no data\.pkl"):
        read_table(path)
    zipped(path, b"\x80\x02" + b"]" * PICKLE_LIMIT_BYTES)
    with pytest.raises(FileError, match=r"its pickle has 4,000,0\d\d bytes, at most 4,000,000"):
        read_table(path)
    zipped(path, good, a=bytes(32))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/byteorder", b"big")
    with pytest.raises(FileError, match="big-endian"):
        read_table(path)
    whole = zipped(path, good, a=bytes(32)).read_bytes()
    for size in (1, 3, 20, 40, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FileError):
            read_table(path)
    end = bytearray(whole)
    end[-10:-6] = struct.pack("<I", 2**31)
    path.write_bytes(end)
    with pytest.raises(FileError, match="its table of contents should have 2,147,483,648 bytes"):
        read_table(path)


def test_members_that_overlap(tmp_path: Path) -> None:
    whole = bytearray(zipped(tmp_path / "m.bin", tensor(8, 0, [8], [1]), a=bytes(32)).read_bytes())
    with zipfile.ZipFile(tmp_path / "m.bin") as archive:
        place = archive.getinfo("m/data/a").header_offset
    # the storage's entry in the table of contents now points to the pickle's header
    at = whole.rindex(b"m/data/a") - 4
    assert whole[at : at + 4] == struct.pack("<I", place)
    whole[at : at + 4] = struct.pack("<I", 0)
    (tmp_path / "m.bin").write_bytes(whole)
    with pytest.raises(FileError, match="overlaps another"):
        read_table(tmp_path / "m.bin")


def test_what_was_never_saved_by_torch(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    for raw, reason in (
        (b"", "starts neither as a zip"),
        (b"<!DOCTYPE html>", "starts neither as a zip"),
        (pickle.dumps({"a": 1}, protocol=2), "not one of torch.save"),
        (pickle.dumps(LEGACY_MAGIC, protocol=2), "its pickle is broken"),
    ):
        path.write_bytes(raw)
        with pytest.raises(FileError, match=reason):
            read_table(path)
    with pytest.raises(FileError, match="is no file"):
        read_table(tmp_path)


def test_a_legacy_storage_longer_than_the_file(tmp_path: Path) -> None:
    path = save({"a": torch.ones(4)}, tmp_path / "m.bin", legacy=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-24] + struct.pack("<Q", 2**50) + whole[-16:])
    with pytest.raises(FileError, match="should have 4,503,599,627,370,496 bytes"):
        read_table(path)
    path.write_bytes(whole[:-4])
    with pytest.raises(FileError, match="should have 16 bytes"):
        read_table(path)


def test_one_storage_under_many_names(tmp_path: Path) -> None:
    """Tied matrices are there once and named twice; a thousand names would make much out of little."""
    ones = torch.ones(1000, 100)
    read_table(save({"a": ones, "b": ones}, tmp_path / "m.bin"))
    path = save({str(i): ones for i in range(1000)}, tmp_path / "m.bin")
    with pytest.raises(FileError, match=r"should have 400,000,000 bytes, the file has [4-6]\d\d,"):
        read_table(path)


@pytest.mark.parametrize("legacy", [False, True])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_damage_ends_in_anything_but_a_file_error(
    legacy: bool, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = io.BytesIO()
    state = {"a": torch.ones(2, 3), "b": torch.ones(4).half()[1:]}
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("p") / "m.bin"
    path.write_bytes(raw)
    try:
        found = read(path)
    except FileError:
        return
    assert all(tensor.dtype in DTYPES.values() for tensor in found.values())
