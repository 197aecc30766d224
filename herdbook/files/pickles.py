"""Pickled weights (pytorch_model.bin, consolidated.00.pth): where each tensor lies, with nothing run.

A pickle is a program. This reader obeys only the commands that a dictionary of plain tensors needs,
and the "functions" that such a program may call are replaced by ones that note what was asked for;
so it cannot do more than describe tensors, in memory bounded by the size of the description. The
bytes are read later, one tensor at a time, as they are of a safetensors file.

    since torch 1.6   a zip: NAME/data.pkl, NAME/data/0, NAME/data/1 …, all stored uncompressed
    before            five pickles (magic, version, machine, the dictionary, the storages' keys), then
                      for each key values:u64 and their bytes

torch.load(weights_only=True) is not used: its restricted reader makes arrays as large as the pickle
asks for, could be made to corrupt memory before torch 2.10 (CVE-2026-24747), and can map only the
newer layout. Tests hold the two together.
"""

from __future__ import annotations

import gc
import io
import math
import pickle
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from herdbook.errors import FileError
from herdbook.files.foreign import MEGABYTE
from herdbook.files.safetensors import WIDTHS, Entry

#: of the program; that of a model of 10,000 tensors has 1.4 MB
PICKLE_LIMIT_BYTES = 4 * MEGABYTE
#: of a zip's table of contents
CONTENTS_LIMIT_BYTES = 8 * MEGABYTE
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


class _Storage(NamedTuple):
    dtype: str
    key: str
    values: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in values
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Ordered(dict[Any, Any]):
    """For collections.OrderedDict; without attributes that a pickle could set."""

    __slots__ = ()


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: object) -> _Tensor:
    """For torch._utils._rebuild_tensor_v2; rest: requires_grad, hooks, metadata."""
    return _Tensor(storage, offset, shape, strides)


def _parameter(tensor: object, *rest: object) -> object:
    """For torch._utils._rebuild_parameter; rest: requires_grad, hooks."""
    return tensor


CALLS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Ordered,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    **{("torch.cuda", name): dtype for name, dtype in STORAGES.items()},
}


class _Forbidden(Exception):
    """The pickle asks for something that weights do not need."""


class _Commands(dict[int, Callable[[Any], None]]):
    def __missing__(self, command: int) -> Callable[[Any], None]:
        known = {ord(one.code): one.name for one in pickletools.opcodes}
        raise _Forbidden(f"it holds the command {known.get(command, command)}")


class _Machine(pickle._Unpickler):
    """The standard library's unpickler in Python, with only these commands and calls."""

    stack: list[Any]
    dispatch = _Commands(
        (command[0], pickle._Unpickler.dispatch[command[0]])
        for command in (
            *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.BINPERSID),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1),
            *(pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE),
            *(pickle.SHORT_BINSTRING, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE),
            *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND),
            *(pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.BINGET, pickle.LONG_BINGET),
            *(pickle.BINPUT, pickle.LONG_BINPUT),
        )
    )

    def reduce(self) -> None:
        """REDUCE, with nothing but the calls above."""
        arguments = self.stack.pop()
        if not any(self.stack[-1] is one for one in (_Ordered, _tensor, _parameter)):
            raise _Forbidden(f"it calls {reprlib.repr(self.stack[-1])}")
        self.stack[-1] = self.stack[-1](*arguments)

    def build(self) -> None:
        """BUILD: torch pins the modules' versions to a state dict; nothing needs them."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Ordered):
            raise _Forbidden(f"it changes {reprlib.repr(self.stack[-1])}")

    dispatch |= {pickle.REDUCE[0]: reduce, pickle.BUILD[0]: build}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CALLS:
            raise _Forbidden(f"it asks for {module}.{name}")
        return CALLS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """pid: ("storage", type, key, device, values), in the old layout with a view at its end."""
        kind, dtype, key, _, values, *view = pid
        whole = kind == "storage" and dtype in WIDTHS and type(key) is str and type(values) is int
        if not whole or view not in ([], [None]) or values < 0:
            raise _Forbidden(f"it asks for {reprlib.repr(pid)}")
        return _Storage(dtype, key, values)


@dataclass
class _File:
    """A file that is being read, and what its refusals have in common."""

    path: Path
    file: BinaryIO
    size: int

    def fail(self, what: str) -> FileError:
        return FileError(
            f"{self.path}: {what}",
            rule="so it is no whole file of pickled weights",
            next="fetch the file again, or use the model's safetensors or GGUF files",
        )

    def forbidden(self, what: str) -> FileError:
        return FileError(
            f"{self.path}: {what}",
            rule="but of a pickle only plain tensors are read; nothing of it was run",
            next="use the model's safetensors or GGUF files; be wary of where this one came from",
        )

    def at(self, start: int, count: int) -> bytes:
        self.file.seek(start)
        return self.file.read(count)

    def run(self, program: io.BytesIO) -> Any:
        """What the pickle at the program's position describes."""
        collecting = gc.isenabled()
        gc.disable()  # else the growing description is walked through again and again
        try:
            return _Machine(program, encoding="utf-8").load()
        except _Forbidden as error:
            raise self.forbidden(str(error)) from None
        except Exception as error:  # whatever a damaged program makes the machine do
            raise self.fail(f"its pickle is broken ({type(error).__name__}: {error})") from error
        finally:
            if collecting:
                gc.enable()


def read_table(path: Path | str, within: str = "") -> dict[str, Entry]:
    """Name → where the tensor lies, after every check. FileError says what is wrong.

    within: the entry of the file's dictionary that holds the tensors, where they are not its own.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}", rule="is no file", next="check the path")
    with path.open("rb") as handle:
        file = _File(path, handle, path.stat().st_size)
        state, places = (_zip if file.at(0, 4) == b"PK\3\4" else _legacy)(file, within)
    if not isinstance(state, dict):
        raise file.forbidden(f"it holds a {type(state).__name__}, no dictionary")
    entries = {}
    for name, value in state.items():
        if type(name) is not str or not isinstance(value, _Tensor):
            raise file.forbidden(f"{reprlib.repr(name)} is a {type(value).__name__}, not a tensor")
        entries[name] = _entry(file, name, value, places)
    total = sum(entry.nbytes for entry in entries.values())
    if total > 2 * file.size:  # tied matrices lie there once and are named twice
        raise file.fail(f"its tensors should have {total:,} bytes, the file has {file.size:,}")
    return entries


def _entry(file: _File, name: str, tensor: _Tensor, places: dict[str, tuple[int, int]]) -> Entry:
    """places: a storage's key → where its bytes start, how many they are."""
    storage, offset, shape, strides = tensor
    if not isinstance(storage, _Storage) or storage.key not in places:
        raise file.fail(f"tensor {name!r} has no values")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)):
        raise file.fail(f"tensor {name!r} has the shape {reprlib.repr(shape)}")
    whole = (offset, *shape, *strides)
    if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**63 for n in whole):
        place = f"offset, shape and strides {reprlib.repr(whole)}"
        raise file.fail(f"tensor {name!r} has {place}")
    width, count = WIDTHS[storage.dtype], math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    start, nbytes = places[storage.key]
    if count and (last >= storage.values or count > storage.values):
        raise file.fail(
            f"tensor {name!r}, {list(shape)} by {list(strides)} from {offset:,}, does not lie in "
            f"its {storage.values:,} values"
        )
    if storage.values * width > nbytes:
        raise file.fail(
            f"tensor {name!r} should have {storage.values * width:,} bytes, it has {nbytes:,}"
        )
    inorder, step = True, 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        inorder, step = inorder and (n == 1 or stride == step), step * n
    kept = None if inorder or not count else strides
    return Entry(storage.dtype, shape, start + offset * width, count * width, kept)


def _within(state: Any, entry: str) -> Any:
    return state.get(entry) if entry and isinstance(state, dict) else state


def _zip(file: _File, within: str) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The dictionary of the newer layout, and where each storage lies."""
    end = file.at(max(file.size - 98, 0), 98)[-98:]  # zip64: 56 and its locator 20; the plain 22
    contents = int.from_bytes(end[-10:-6], "little")
    if end[-22:-18] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise file.fail("the zip's end is missing")
    if end[-42:-38] == b"PK\6\7":
        contents = int.from_bytes(end[-58:-50], "little")
    if contents > CONTENTS_LIMIT_BYTES:
        raise file.fail(f"its table of contents should have {contents:,} bytes")
    try:
        members = zipfile.ZipFile(file.file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise file.fail(f"the zip is broken ({error})") from error
    places: dict[str, tuple[int, int]] = {}
    for one in members:
        if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1:
            raise file.forbidden(f"{one.filename!r} is compressed or encrypted")
        head = file.at(one.header_offset, 30) if one.header_offset >= 0 else b""
        if head[:4] != b"PK\3\4" or len(head) < 30 or one.filename in places:
            raise file.fail(f"{one.filename!r} is damaged or comes twice")
        name, extra = struct.unpack("<HH", head[26:30])
        places[one.filename] = one.header_offset + 30 + name + extra, one.file_size
    at = 0
    for member, (start, size) in sorted(places.items(), key=lambda item: item[1]):
        if start < at or start + size > file.size:
            raise file.fail(f"{member!r} overlaps another or goes past the end")
        at = start + size
    roots = [name.removesuffix("data.pkl") for name in places if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise file.fail("the zip holds no data.pkl")
    root = roots[0]
    start, size = places[root + "data.pkl"]
    if size > PICKLE_LIMIT_BYTES:
        raise file.fail(f"its pickle has {size:,} bytes, at most {PICKLE_LIMIT_BYTES:,} are read")
    if (order := places.get(root + "byteorder")) and file.at(order[0], 6) != b"little":
        raise file.forbidden("its bytes are in big-endian order")
    data = root + "data/"
    storages = {n.removeprefix(data): place for n, place in places.items() if n.startswith(data)}
    return _within(file.run(io.BytesIO(file.at(start, size))), within), storages


def _legacy(file: _File, within: str) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same of the layout before torch 1.6."""
    program = io.BytesIO(file.at(0, PICKLE_LIMIT_BYTES))
    if file.size < 2 or program.read(2) != b"\x80\x02":
        raise file.fail("it starts neither as a zip nor as a pickle of torch")
    program.seek(0)
    if file.run(program) != LEGACY_MAGIC or file.run(program) != LEGACY_VERSION:
        raise file.fail("it is a pickle, but not one of torch.save")
    machine, state, keys = (file.run(program) for _ in range(3))
    state = _within(state, within)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise file.forbidden("its bytes are in big-endian order")
    if not isinstance(keys, list) or not isinstance(state, dict):
        raise file.fail("its list of storages is missing")
    tensors = [value for value in state.values() if isinstance(value, _Tensor)]
    storages = {one.storage.key: one.storage for one in tensors if type(one.storage) is _Storage}
    places: dict[str, tuple[int, int]] = {}
    at = program.tell()
    for key in keys:
        if type(key) is not str or key not in storages or key in places:
            raise file.fail(f"the storage {reprlib.repr(key)} belongs to no tensor, or comes twice")
        count = int.from_bytes(file.at(at, 8), "little")
        nbytes = count * WIDTHS[storages[key].dtype]
        if at + 8 + nbytes > file.size:
            raise file.fail(f"the storage {key!r} should have {nbytes:,} bytes")
        places[key] = at + 8, nbytes
        at += 8 + nbytes
    return state, places
