"""How much memory and time it takes to load a synthetic checkpoint, measured in a process of its own.

python -m tests.model.lean LAYOUT MEGABYTES     → one line of JSON
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from herdbook.files import gguf, safetensors
from herdbook.model.checkpoint import compressed, expected_shapes, load_decoder
from herdbook.model.checkpoint.meta import meta_name
from herdbook.model.checkpoint.weights import NAMES
from herdbook.model.families import families
from herdbook.training.memory import Peak

#: layout → the type that its matrices have, the type that they are loaded in
LAYOUTS = {
    "safetensors": (torch.bfloat16, torch.bfloat16),
    "converted": (torch.bfloat16, torch.float32),
    "bin": (torch.float16, torch.float16),
    "bin-legacy": (torch.float16, torch.float32),
    "meta": (torch.bfloat16, torch.float32),
    "gguf": ("Q8_0", torch.float32),
    "compressed": (torch.float16, torch.float32),  # the embedding's; matrices have 4 bits
}
WIDTH = 512
VOCAB = 8000


def config(megabytes: int, itemsize: int) -> dict[str, Any]:
    """Keys of a LLaMA of about so many megabytes; its embedding is the largest tensor."""
    layer = 4 * WIDTH * WIDTH + 3 * WIDTH * 4 * WIDTH
    layers = max(1, round((megabytes * 1e6 / itemsize - 2 * VOCAB * WIDTH) / layer))
    return {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "rms_norm_eps": 1e-5,
    }


def write(folder: Path, layout: str, megabytes: int) -> Path:
    """The checkpoint; its path."""
    stored, loaded = LAYOUTS[layout]
    source = config(megabytes, loaded.itemsize)
    family = families()["llama"]
    shapes = expected_shapes(family.config(source, "config.json"))
    values = np.random.default_rng(0).integers(0, 0x3C00, 1 << 22, np.uint16)  # floats of 0 to 1

    def raw(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(values, shape)

    if layout == "gguf":
        metadata: dict[str, Any] = {
            "general.architecture": "llama",
            "llama.context_length": 2048,
            "llama.embedding_length": WIDTH,
            "llama.block_count": source["num_hidden_layers"],
            "llama.feed_forward_length": 4 * WIDTH,
            "llama.attention.head_count": 8,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
        }
        held = [
            (family.gguf_name(n), stored if len(s) > 1 else "F32", raw(s).view(np.float16))
            for n, s in shapes.items()
        ]
        gguf.write(folder / "model.gguf", metadata, held)
        return folder / "model.gguf"
    if layout == "meta":
        params = {"dim": WIDTH, "n_heads": 8, "n_layers": source["num_hidden_layers"]}
        params |= {"ffn_dim_multiplier": 1.5, "multiple_of": WIDTH}
        (folder / "params.json").write_text(json.dumps(params))
        for i in range(2):
            part = {}
            for name, shape in shapes.items():
                meta = meta_name(name)
                axis = 1 if any(one in meta for one in ("wo", "w2", "tok_")) else 0
                mine = [n // 2 if a == axis and len(shape) > 1 else n for a, n in enumerate(shape)]
                part[meta] = torch.from_numpy(raw(tuple(mine))).view(stored)
            torch.save(part, folder / f"consolidated.0{i}.pth")
        return folder
    (folder / "config.json").write_text(json.dumps(source))
    names = {family.hf_name(name): shape for name, shape in shapes.items()}
    if layout.startswith("bin"):
        held_ = {n: torch.from_numpy(raw(shape)).view(stored) for n, shape in names.items()}
        newer = layout == "bin"
        torch.save(held_, folder / "pytorch_model.bin", _use_new_zipfile_serialization=newer)
    else:
        plan = {name: (NAMES[stored], shape) for name, shape in names.items()}
        if layout == "compressed":
            (folder / "config.json").write_text(
                json.dumps(source | {compressed.KEY: compressed.config(4, [])})
            )
            for name, shape in list(names.items()):
                if "_proj" in name:
                    del plan[name], names[name]
                    module, (rows, columns) = name.removesuffix(".weight"), shape
                    for leaf, kind, size in (
                        (compressed.PACKED, "I32", (rows, columns // 8)),
                        (compressed.ZERO, "I32", (rows // 8, columns // 32)),
                        (compressed.SCALE, "F16", (rows, columns // 32)),
                        (compressed.SHAPE, "I64", (2,)),
                    ):
                        plan[f"{module}.{leaf}"] = kind, size
                        # as many values of 16 bits as the tensor has bytes
                        names[f"{module}.{leaf}"] = (*size, {"I32": 2, "I64": 4, "F16": 1}[kind])
        file = folder / "model.safetensors"
        sizes = {
            f"{n.removesuffix('.weight')}.{compressed.SHAPE}": np.array(s, np.int64)
            for n, s in ((family.hf_name(name), shape) for name, shape in shapes.items())
        }
        safetensors.write(
            file,
            plan,
            lambda n: sizes.get(n, raw(names[n])).reshape(-1).view(np.uint8).data,
            {},
        )
    return folder


def plain(path: Path) -> None:
    """Read the weight files' bytes into one small buffer."""
    buffer = bytearray(8 << 20)
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix != ".json"]
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def evict(path: Path) -> None:
    """Put the files out of the system's cache, so that the disk is read."""
    for file in [path] if path.is_file() else path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def measure(layout: str, megabytes: int) -> dict[str, Any]:
    loaded = LAYOUTS[layout][1]
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        load_decoder(write(Path(small), layout, 20), dtype=loaded)  # what is imported and kept once
        if (child := os.fork()) == 0:  # the writer's memory is not the loader's
            write(Path(large), layout, megabytes)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        path = Path(large) / "model.gguf" if layout == "gguf" else Path(large)
        size = sum(f.stat().st_size for f in Path(large).iterdir())
        seconds: dict[str, list[float]] = {}

        def clocked(kind: str, work: Callable[[], Any]) -> Any:
            """The work's result; its seconds, and those of the processor, which others do not slow."""
            wall, cpu = time.perf_counter(), time.process_time()
            result = work()
            seconds.setdefault(kind, []).append(time.perf_counter() - wall)
            seconds.setdefault(f"{kind}_cpu", []).append(time.process_time() - cpu)
            return result

        for kind in ("cold", "warm", "warm", "warm"):
            if kind == "cold":
                evict(path)
            clocked(f"{kind}_plain", lambda: plain(path))
            if kind == "cold":
                evict(path)
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory that was kept is used again
            before = resident()
            with Peak() as peak:
                decoder = clocked(kind, lambda: load_decoder(path, dtype=loaded))
            held = [parameter.nbytes for parameter in decoder.parameters()]
            del decoder
    return {
        "layout": layout,
        "file_bytes": size,
        "final_bytes": sum(held),
        "largest_bytes": max(held),
        "peak_bytes": peak.bytes - before,
        **{f"{kind}_mb_s": size / median(taken) / 1e6 for kind, taken in seconds.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        name, _, size = argument.partition(":")
        print(json.dumps(measure(name, int(size))), flush=True)
