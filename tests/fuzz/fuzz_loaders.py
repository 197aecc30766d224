"""Hostile files by the thousand: every loader ends in a result or in an error of Herdbook's own.

`make fuzz FUZZ_SECONDS=600`; a target gets its share of the time. Not part of `make test`. What it
finds is mended and becomes a case in tests/files, tests/model/test_hostile.py or
tests/tokens/test_foreign.py.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from herdbook.files import gguf, pickles, safetensors
from herdbook.model import delta
from herdbook.model.checkpoint import INDEX, LEGACY_INDEX, load_decoder, save_gguf, save_hf
from herdbook.model.checkpoint.opening import open_checkpoint
from herdbook.model.families import families
from herdbook.progress import Progress
from tests.fuzz.hostile import JSON, NUMBER, ODD, again_and_again, common, damaged, holds

# --- safetensors ---

ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "U8", "Q4", ""]) | JSON,
        "shape": st.lists(NUMBER, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBER, min_size=1, max_size=3) | JSON,
    },
)


def test_safetensors_headers(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"

    @common
    @given(
        st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRY | JSON), st.binary()
    )
    def target(header: dict[str, Any], rest: bytes) -> None:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        holds(lambda: safetensors.read_header(path))

    again_and_again(target)


def test_damaged_folders(model: Path, tmp_path: Path) -> None:
    """Header and beginning of a real file; then everything is loaded that opens."""
    raw = (model / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(raw[:8], "little")
    folder = Path(shutil.copytree(model, tmp_path / "m"))

    @common
    @given(st.data())
    def target(data: st.DataObject) -> None:
        (folder / "model.safetensors").write_bytes(damaged(raw[:head], data) + raw[head:])
        holds(lambda: load_decoder(folder, dtype=torch.float32))

    again_and_again(target)


# --- GGUF ---

KEYS = st.sampled_from(
    ["general.architecture", "general.alignment", "llama.block_count", "llama.rope.freq_base",
     "llama.embedding_length", "llama.attention.head_count", "llama.attention.head_count_kv",
     "llama.attention.key_length", "llama.rope.scaling.type", "llama.rope.scaling.factor",
     "llama.expert_count", "llama.attention.sliding_window", "x"]
)  # fmt: skip


@st.composite
def gguf_value(draw: st.DrawFn, depth: int = 0) -> bytes:
    kind = draw(st.integers(0, 13))
    if kind == 8:
        text = draw(st.text(max_size=4)).encode()
        length = draw(st.just(len(text)) | ODD)
        return struct.pack("<IQ", kind, length % 2**64) + text
    if kind == 9 and depth < 3:
        inner = draw(gguf_value(depth=depth + 1))
        count = draw(st.integers(0, 3) | ODD) % 2**64
        return struct.pack("<I", kind) + inner[:4] + struct.pack("<Q", count) + inner[4:]
    return struct.pack("<I", kind) + draw(st.binary(min_size=1, max_size=8))


@st.composite
def gguf_tensor(draw: st.DrawFn) -> bytes:
    name = draw(st.text(max_size=3) | st.just("token_embd.weight")).encode()
    shape = draw(st.lists(ODD | st.integers(0, 64), max_size=5))
    numbers = [n % 2**64 for n in shape]
    form = f"<I{len(shape)}QIQ"
    type, offset = draw(st.integers(0, 40)), draw(st.integers(0, 4).map(lambda n: n * 32) | ODD)
    body = struct.pack(form, len(shape), *numbers, type, offset % 2**64)
    return struct.pack("<Q", len(name)) + name + body


def test_gguf_headers(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    @common
    @given(
        st.lists(st.tuples(KEYS, gguf_value()), max_size=5),
        st.lists(gguf_tensor(), max_size=4),
        st.integers(0, 5) | ODD,
        st.binary(max_size=200),
    )
    def target(keys: list[Any], tensors: list[bytes], more: int, rest: bytes) -> None:
        raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), (len(keys) + more // 5) % 2**64)
        for key, value in keys:
            raw += struct.pack("<Q", len(key)) + key.encode() + value
        path.write_bytes(raw + b"".join(tensors) + rest)
        holds(lambda: open_checkpoint(path))

    again_and_again(target)


def test_damaged_ggufs(model: Path, tmp_path: Path) -> None:
    save_gguf(load_decoder(model), None, tmp_path / "m.gguf", "Q4_0")
    raw = (tmp_path / "m.gguf").read_bytes()
    head = min(one.offset for one in gguf.read(tmp_path / "m.gguf").tensors.values())

    @common
    @given(st.data())
    def target(data: st.DataObject) -> None:
        (tmp_path / "m.gguf").write_bytes(damaged(raw[:head], data) + raw[head:])
        holds(lambda: load_decoder(tmp_path / "m.gguf", quantised=data.draw(st.booleans())))

    again_and_again(target)


# --- pickles ---

ATOMS = [
    *(
        b"}",
        b"]",
        b")",
        b"(",
        b"N",
        b"\x88",
        b"\x89",
        b"t",
        b"u",
        b"s",
        b"a",
        b"e",
        b"R",
        b"b",
        b"Q",
    ),
    *(b"\x85", b"\x86", b"\x87", b"q\0", b"q\1", b"h\0", b"h\1", b"r\xff\xff\xff\xff", b"\x81"),
    *(b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nFloatStorage\n", b"cos\nsystem\n"),
    *(b"X\7\0\0\0storage", b"X\1\0\0\0a", b"X\3\0\0\0cpu", b"K\4", b"K\0", b"M\xff\xff"),
    *(b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\0", b"G" + b"\0" * 8, b"\x80\2", b"."),
]


def test_pickled_programs(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"

    @common
    @given(st.lists(st.sampled_from(ATOMS) | st.binary(max_size=3), max_size=40))
    def target(commands: list[bytes]) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", b"\x80\2" + b"".join(commands) + b".")
            archive.writestr("m/data/a", bytes(16))
        holds(lambda: pickles.read_table(path))

    again_and_again(target)


def test_damaged_pickles(model: Path, tmp_path: Path) -> None:
    """The program and the zip's own structures of a real file, in both layouts."""
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    newer = path.read_bytes()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    older = path.read_bytes()
    stream = io.BytesIO(older)
    for _ in range(3):
        pickle.load(stream)  # magic, version, machine: torch's own words
    end = older.index(b".", stream.tell() + 3000)

    @common
    @given(st.data())
    def target(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from(["program", "zip", "older"]))
        if kind == "program":
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in members.items():
                    pickled = name.endswith("data.pkl")
                    archive.writestr(name, damaged(content, data) if pickled else content)
        elif kind == "zip":
            path.write_bytes(newer[:-4000] + damaged(newer[-4000:], data))
        else:
            path.write_bytes(damaged(older[:end], data) + older[end:])
        holds(lambda: load_decoder(folder, dtype=torch.float32))

    again_and_again(target)


# --- configurations, indices, records ---


def test_configs_and_indices(model: Path, tmp_path: Path) -> None:
    """Every family's configuration with other values; every JSON file of a folder with odd content."""
    folder = tmp_path / "m"
    decoder = load_decoder(model)
    save_hf(decoder, None, folder, torch.float32, shard_bytes=100_000)
    config = json.loads((folder / "config.json").read_text())
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    sources = [config | {"model_type": name} for name in families()]
    sources += [
        {
            "dim": 64,
            "n_heads": 4,
            "n_kv_heads": 2,
            "n_layers": 3,
            "norm_eps": 1e-6,
            "multiple_of": 32,
        }
    ]
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    tuned = tmp_path / "tuned"
    shutil.copytree(model, tuned)
    held = load_file(tuned / "model.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in held.items()}, tuned / "model.safetensors")
    delta.make(base, tuned, tmp_path / "delta", progress=Progress())
    header = safetensors.read_header(tmp_path / "delta" / delta.RECORD)
    record = json.loads(header.metadata["herdbook_delta"])
    meta = tmp_path / "meta"
    meta.mkdir()
    torch.save({"tok_embeddings.weight": torch.ones(8, 64)}, meta / "consolidated.00.pth")

    @common
    @given(st.data())
    def target(data: st.DataObject) -> None:
        def changed(value: Any) -> Any:
            """With some of its values replaced, at any depth."""
            if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
                key = data.draw(st.sampled_from(sorted(value)))
                return {**value, key: changed(value[key])}
            return data.draw(JSON)

        kind = data.draw(st.sampled_from(["config", "params", "index", "record", "bytes"]))
        if kind == "params":
            (meta / "params.json").write_text(json.dumps(changed(sources[-1])))
            holds(lambda: open_checkpoint(meta))
            return
        if kind == "record":
            text = json.dumps(changed(record))
            safetensors.write(
                tmp_path / "delta" / delta.RECORD, {}, lambda name: memoryview(b""),
                {"herdbook_delta": text},
            )  # fmt: skip
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
            holds(
                lambda: delta.apply(
                    base, tmp_path / "delta", tmp_path / "again", progress=Progress()
                )
            )
            return
        new = data.draw(st.sampled_from(sources[:-1]))
        for _ in range(data.draw(st.integers(0, 3))):
            new = changed(new) if isinstance(new, dict) else new
        (folder / "config.json").write_text(json.dumps(new if kind == "config" else config))
        index = {"weight_map": weight_map}
        name = data.draw(st.sampled_from([INDEX, LEGACY_INDEX]))
        for one in (INDEX, LEGACY_INDEX):
            (folder / one).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(changed(index) if kind == "index" else index))
        if kind == "bytes":
            file = folder / data.draw(st.sampled_from([name, "config.json"]))
            file.write_bytes(damaged(file.read_bytes(), data))
        holds(lambda: load_decoder(folder, dtype=torch.float32))

    again_and_again(target)
