"""The engine's step as machine code: native.cpp, compiled on first use for the processor at hand.

What it serves: LLaMA-shaped decoders on the CPU whose matrices are kept in 4 or 8 bits, where the
processor has AVX2 (better: AVX-512 VNNI) and the machine a C++ compiler. Everything else goes the
PyTorch way, which is also its twin in the tests. The weights are the packaged ones, not quantised
again; the inputs of each product are rounded to 8 bits in blocks of 32, as llama.cpp does.

HERDBOOK_NATIVE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Block, Decoder
from herdbook.model.layers import BLOCK, Int4Linear, Int8Linear, RMSNorm
from herdbook.model.mlp import MLP
from herdbook.model.references import cache as fetched

if TYPE_CHECKING:
    from herdbook.engine.cache import Cache

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = (SOURCE, SOURCE.with_name("vector.h"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC")
TILE = 16
#: how the cache may keep its numbers
CACHES = (torch.float32, torch.bfloat16, torch.int8)

log = logging.getLogger("herdbook.engine")


class Matrix(ctypes.Structure):
    _fields_ = [
        ("tiles", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "scales")),
        ("window", ctypes.c_int64),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "hidden",
                "heads",
                "kv_heads",
                "head_dim",
                "ffn",
                "vocab",
                "layers",
                "page_tokens",
                "cache_bytes",
            )
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("layer", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        ("head", Matrix),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "sequences", "most", "wanted", "context", "threads")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "cos", "sin", "positions", "slots", "firsts", "pages", "wants")
        ),
        ("logits", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    ]


class Span(NamedTuple):
    """What a step computes of one sequence: these tokens, from place `start` on."""

    ids: Sequence[int]
    start: int
    pages: Sequence[int]
    wanted: int = 1  # logits are wanted after so many of them, the last ones


# --- building --------------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, from the cache or built now; None where this machine cannot have it.

    Why not is said once, as a warning: without it the engine is right but several times slower.
    """
    if os.environ.get("HERDBOOK_NATIVE") == "0":
        return None
    try:
        return _library()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = str(error)
        if isinstance(error, subprocess.CalledProcessError):
            said = error.stderr.decode(errors="replace").strip().splitlines()
            reason = f"{error.cmd[0]} failed: {said[0] if said else error}"
        log.warning("the engine computes by PyTorch, slower than it could: %s", reason)
        return None


def _library() -> ctypes.CDLL:
    if not torch.cpu._is_avx2_supported():
        raise RuntimeError("this processor has no AVX2")
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (install g++, or name one in CXX)")
    omp = next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)
    if omp is None:
        raise RuntimeError("PyTorch came without its OpenMP library (libgomp)")
    # the threads are torch's own: its OpenMP is made visible, and none is linked
    ctypes.CDLL(str(omp), mode=ctypes.RTLD_GLOBAL)
    found = ctypes.CDLL(str(_built(compiler)))
    found.herd_scratch.restype = ctypes.c_int64
    return found


def _built(compiler: str) -> Path:
    """The shared object for this source, compiler and processor."""
    about = os.stat(compiler)
    version = f"{os.path.realpath(compiler)} {about.st_size} {about.st_mtime_ns} {FLAGS}"
    key = hashlib.sha256(
        b"".join(one.read_bytes() for one in SOURCES) + (version + _processor()).encode()
    ).hexdigest()[:16]
    target = fetched() / "native" / f"step-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            made = Path(work) / "step.o"
            run = functools.partial(subprocess.run, check=True, capture_output=True)
            run([compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", str(made)])
            run([compiler, "-shared", str(made), "-o", str(made.with_suffix(".so"))])
            os.replace(made.with_suffix(".so"), target)
    return target


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    return "".join(line for line in text.splitlines() if line.startswith(("flags", "model name")))


# --- packing ---------------------------------------------------------------------------------------


def pack_tiles(layer: nn.Module) -> Tensor:
    """A layer's matrix as the tiles that native.cpp reads, uint8 [R / 16, blocks, bytes]."""
    assert isinstance(layer, Int4Linear | Int8Linear)
    words = layer.codes.view(torch.int32)  # [R, B, parts]: four codes, or eight, of a row
    scale, minimum = (
        (layer.scale, layer.minimum)
        if isinstance(layer, Int4Linear)
        else (layer.scale[..., 0], layer.scale[..., 0] * -128)
    )
    rows, blocks, parts = words.shape
    out = torch.empty(rows // TILE, blocks, (parts + 1) * TILE, dtype=torch.int32)
    codes = out[..., : parts * TILE].view(rows // TILE, blocks, parts, TILE)
    codes.copy_(words.view(rows // TILE, TILE, blocks, parts).permute(0, 2, 3, 1))
    if isinstance(layer, Int8Linear):
        codes ^= -0x7F7F7F80  # 0x80808080: bytes from 0 to 255
    floats = out[..., parts * TILE :].view(torch.float16).view(*out.shape[:2], 2, TILE)
    for at, one in enumerate((scale, minimum)):
        floats[:, :, at] = one.view(rows // TILE, TILE, blocks).transpose(1, 2)
    return out.view(torch.uint8)


class Step:
    """The step of one decoder."""

    def __init__(self, decoder: Decoder, library: ctypes.CDLL) -> None:
        c = decoder.config
        self.decoder, self.library, self.config = decoder, library, c
        self.kept: list[Tensor] = []  # what the structures point into
        self._layers = (Layer * c.layers)()
        for layer, block in zip(self._layers, decoder.blocks, strict=True):
            assert isinstance(block, Block)
            self._fill(layer, block)
        head = decoder.head_layer
        kept = isinstance(head, Int4Linear | Int8Linear)
        tiles = pack_tiles(head if kept else Int8Linear.of(head.dense(torch.float32)))
        assert decoder.norm is not None
        self.model = Model(
            hidden=c.hidden,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            ffn=c.ffn,
            vocab=c.vocab,
            layers=c.layers,
            eps=c.eps,
            scale=c.attention_scale or c.head_dim**-0.5,
            layer=self._layers,
            norm=self._floats(decoder.norm.weight),
            head=self._matrix(tiles, None),
        )
        self._only_head = Model.from_buffer_copy(self.model)
        self._only_head.layers = 0
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: Tensor) -> int:
        return self._keep(tensor.detach().float().contiguous())

    def _matrix(self, tiles: Tensor, bias: Tensor | None) -> Matrix:
        count, blocks, size = tiles.shape
        pointer = None if bias is None else self._floats(bias)
        return Matrix(self._keep(tiles), pointer, count * TILE, blocks * BLOCK, size // 64 - 1)

    def _fill(self, layer: Layer, block: Block) -> None:
        attention, mlp = block.attention, block.mlp
        layer.attention_norm = self._floats(block.attention_norm.weight)
        assert block.mlp_norm is not None and isinstance(mlp, MLP) and mlp.gate is not None
        layer.mlp_norm = self._floats(block.mlp_norm.weight)
        if attention.q_norm is not None and attention.k_norm is not None:
            layer.q_norm = self._floats(attention.q_norm.weight)
            layer.k_norm = self._floats(attention.k_norm.weight)
        layer.qkv = self._joined([attention.q, attention.k, attention.v])
        layer.o, layer.down = self._joined([attention.o]), self._joined([mlp.down])
        gate, up = mlp.gate, mlp.up
        bias = None
        if gate.bias is not None and up.bias is not None:
            bias = _alternate(gate.bias.view(-1, TILE), up.bias.view(-1, TILE))
        layer.gate_up = self._matrix(_alternate(pack_tiles(gate), pack_tiles(up)), bias)
        layer.window = attention.look.window or 0

    def _joined(self, linears: Sequence[nn.Module]) -> Matrix:
        biases = [bias for one in linears if isinstance(bias := one.bias, Tensor)]
        return self._matrix(
            torch.cat([pack_tiles(one) for one in linears]), torch.cat(biases) if biases else None
        )

    @torch.inference_mode()
    def __call__(self, cache: Cache, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Logits float32 [R, V] after the tokens that want them, and what the last layer gives
        [T, hidden], before the norm; keys and values go into the cache."""
        decoder, model, size = self.decoder, self.model, cache.page_tokens
        model.page_tokens, model.cache_bytes = size, cache.dtype.itemsize
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        for layer, scales in zip(self._layers, cache.scales, strict=False):
            layer.scales = scales.data_ptr()
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wants: list[int] = []
        firsts = [0]
        for span in spans:
            places = range(span.start, span.start + len(span.ids))
            ids += span.ids
            positions += places
            slots += [span.pages[at // size] * size + at % size for at in places]
            wants += range(len(ids) - span.wanted, len(ids))
            firsts.append(len(ids))
        context = max(positions) + 1
        most = -(-context // size)
        table = torch.tensor([[*one.pages[:most], *[0] * (most - len(one.pages))] for one in spans])
        whole = [torch.tensor(one) for one in (positions, slots, firsts)]
        wanted = torch.tensor(wants, dtype=torch.int64)
        assert decoder.rotary is not None
        cos, sin = (one.contiguous() for one in decoder.rotary(whole[0], torch.float32))
        x = decoder.embed(torch.tensor(ids)).float().contiguous()
        logits = torch.empty(len(wants), self.config.vocab)
        self._run(model, (len(spans), most), context, x, cos, sin, *whole, table, wanted, logits)
        return logits, x

    @torch.inference_mode()
    def head(self, x: Tensor) -> Tensor:
        """Logits float32 [R, V] of rows that the last layer gave, [R, hidden]: what a step gives them."""
        x, nothing = x.contiguous(), torch.zeros(1, dtype=torch.int64)
        logits = torch.empty(len(x), self.config.vocab)
        every = torch.arange(len(x))
        self._run(self._only_head, (0, 0), 1, x, x, x, *[nothing] * 4, every, logits)
        return logits

    def _run(
        self, model: Model, sizes: tuple[int, int], context: int, x: Tensor, *others: Tensor
    ) -> None:
        """sizes: sequences, most pages of one. The last two of `others` are wanted and logits."""
        threads = torch.get_num_threads()
        room = self.library.herd_scratch(
            ctypes.byref(model), *map(ctypes.c_int64, (len(x), context, threads))
        )
        if self._scratch.numel() < room + 64:
            self._scratch = torch.empty(room + 64, dtype=torch.uint8)
        pointers = [one.data_ptr() for one in (x, *others)]
        scratch = (self._scratch.data_ptr() + 63) // 64 * 64
        batch = Batch(len(x), *sizes, len(others[-1]), context, threads, *pointers, scratch)
        self.library.herd_step(ctypes.byref(model), ctypes.byref(batch))


def _alternate(a: Tensor, b: Tensor) -> Tensor:
    """One of a, one of b, and so on."""
    return torch.stack([a, b], 1).flatten(0, 1)


def step_for(decoder: Decoder) -> Step | None:
    """The native step of this decoder; None where it, the processor or the machine does not fit."""
    if not _fits(decoder):
        return None
    found = library()
    return None if found is None else Step(decoder, found)


def _fits(decoder: Decoder) -> bool:
    if (
        type(decoder) is not Decoder or decoder.headless or decoder.soft is not None
    ):  # RWKV, T5 … are modules of their own
        return False
    c = decoder.config
    plain = DecoderConfig(
        *(c.vocab, c.hidden, c.layers, c.heads, c.kv_heads, c.head_dim, c.ffn, c.max_pos),
        eps=c.eps,
        rope_base=c.rope_base,
        rope_scaling=c.rope_scaling,
        windows=c.windows,
        attention_scale=c.attention_scale,
        qkv_bias=c.qkv_bias,
        out_bias=c.out_bias,
        qk_norm=c.qk_norm,
        mlp_bias=c.mlp_bias,
        tied=c.tied,
    )
    if c != plain or decoder.device.type != "cpu" or not isinstance(decoder.norm, RMSNorm):
        return False
    sizes = (c.hidden, c.heads * c.head_dim, c.ffn)
    rows = (*sizes, c.kv_heads * c.head_dim, c.vocab)
    even = not any(size % BLOCK for size in sizes) and not any(one % TILE for one in rows)
    kept = all(
        isinstance(one, (Int4Linear, Int8Linear))
        for block in decoder.blocks
        for one in block.modules()
        if hasattr(one, "inputs")
    )
    return even and kept and c.head_dim % TILE == 0
