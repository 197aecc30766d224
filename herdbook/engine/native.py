"""The decoding step as machine code: native.cpp, compiled on first use for the processor at hand.

What it serves: LLaMA-shaped decoders on the CPU whose matrices are kept in 4 or 8 bits, where the
processor has AVX2 (better: AVX-512 VNNI) and the machine a C++ compiler. Everything else, and every step with more
than `MOST` sequences or with part of a prompt, goes the PyTorch way, which is also its twin in the
tests. The weights are the packaged ones, not quantised again; the inputs of each product are rounded
to 8 bits in blocks of 32, as llama.cpp does.

HERDBOOK_NATIVE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Block, Decoder
from herdbook.model.layers import BLOCK, Int4Linear, Int8Linear, RMSNorm
from herdbook.model.mlp import MLP
from herdbook.model.references import cache

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = (SOURCE, SOURCE.with_name("vector.h"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC")
TILE = 16
#: sequences of one step: more, and products of whole matrices are faster
MOST = 16


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
        ("cache", ctypes.c_void_p),
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
                "bfloat_cache",
            )
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("layer", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        ("head", Matrix),
    ]


# --- building --------------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, from the cache or built now; None where this machine cannot have it."""
    if os.environ.get("HERDBOOK_NATIVE") == "0" or not torch.cpu._is_avx2_supported():
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    omp = next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)
    if compiler is None or omp is None:
        return None
    # the threads are torch's own: its OpenMP is made visible, and none is linked
    ctypes.CDLL(str(omp), mode=ctypes.RTLD_GLOBAL)
    try:
        found = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError):
        return None
    found.herd_scratch.restype = ctypes.c_int64
    return found


def _built(compiler: str) -> Path:
    """The shared object for this source, compiler and processor."""
    about = subprocess.run(
        [compiler, *FLAGS, "-Q", "--help=target", "--version"],
        capture_output=True,
        check=False,
    ).stdout
    key = hashlib.sha256(
        b"".join(one.read_bytes() for one in SOURCES) + about + _processor().encode()
    ).hexdigest()[:16]
    target = cache() / "native" / f"step-{key}.so"
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


def pack_tiles(codes: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """codes uint8 [R, B, 32], scale and minimum [R, B] → the tiles that native.cpp reads, uint8."""
    rows, blocks, _ = codes.shape
    # [tile, row, block, part, 4] → [tile, block, part, row, 4]
    parts = codes.view(rows // TILE, TILE, blocks, 8, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        parts = parts[:, :, :4] | (parts[:, :, 4:] << 4)
    bytes = parts.reshape(rows // TILE, blocks, -1)
    floats = torch.stack([scale, minimum]).to(torch.float16)  # [2, R, B]
    floats = floats.view(2, rows // TILE, TILE, blocks).permute(1, 3, 0, 2).contiguous()
    tail = floats.view(rows // TILE, blocks, -1).view(torch.uint8)
    return torch.cat([bytes, tail], -1).contiguous()


def unpacked(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """codes uint8 [R, B, 32], scale, minimum [R, B], bits; None for a layer that keeps no blocks."""
    if isinstance(layer, Int4Linear):
        codes = torch.cat([layer.codes & 15, layer.codes >> 4], -1)
        return codes, layer.scale, layer.minimum, 4
    if isinstance(layer, Int8Linear):
        scale = layer.scale[..., 0]
        codes = (layer.codes.to(torch.int16) + 128).to(torch.uint8)
        return codes, scale, scale * -128, 8
    return None


def _eight_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """A dense matrix in blocks of 8 bits: one that came from Q8_0 gets its very codes again."""
    blocks = weight.float().view(len(weight), -1, BLOCK)
    scale = blocks.abs().amax(-1) / 127
    codes = torch.round(blocks / scale.clamp_min(1e-30)[..., None]) + 128
    return codes.to(torch.uint8), scale, scale * -128, 8


class Step:
    """The decoding step of one decoder over one cache of keys and values."""

    def __init__(self, decoder: Decoder, library: ctypes.CDLL, page_tokens: int) -> None:
        c = decoder.config
        self.decoder, self.library, self.config = decoder, library, c
        self.kept: list[Tensor] = []  # what the structures point into
        self._layers = (Layer * c.layers)()
        for layer, block in zip(self._layers, decoder.blocks, strict=True):
            assert isinstance(block, Block)
            self._fill(layer, block)
        head = decoder.embed if decoder.head is None else decoder.head
        eight = unpacked(head)
        assert decoder.norm is not None
        self.model = Model(
            hidden=c.hidden,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            ffn=c.ffn,
            vocab=c.vocab,
            layers=c.layers,
            page_tokens=page_tokens,
            bfloat_cache=int(decoder.dtype == torch.bfloat16),
            eps=c.eps,
            scale=c.attention_scale or c.head_dim**-0.5,
            layer=self._layers,
            norm=self._floats(decoder.norm.weight),
            head=self._matrix([eight or _eight_bits(head.dense(torch.float32))], None),
        )
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: Tensor) -> int:
        return self._keep(tensor.detach().float().contiguous())

    def _matrix(
        self, parts: Sequence[tuple[Tensor, Tensor, Tensor, int]], bias: Tensor | None
    ) -> Matrix:
        bits = parts[0][3]
        codes, scale, minimum = (
            torch.cat(some) for some in zip(*(part[:3] for part in parts), strict=True)
        )
        tiles = pack_tiles(codes, scale, minimum, bits)
        rows, columns = codes.shape[0], codes.shape[1] * BLOCK
        pointer = None if bias is None else self._floats(bias)
        return Matrix(self._keep(tiles), pointer, rows, columns, bits)

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
        gate, up = unpacked(mlp.gate), unpacked(mlp.up)
        assert gate is not None and up is not None
        mixed = [_alternate(a, b) for a, b in zip(gate[:3], up[:3], strict=True)]
        biased = mlp.gate.bias is not None and mlp.up.bias is not None
        bias = _alternate(mlp.gate.bias, mlp.up.bias) if biased else None  # type: ignore[arg-type]
        layer.gate_up = self._matrix([(mixed[0], mixed[1], mixed[2], gate[3])], bias)
        layer.window = attention.look.window or 0

    def _joined(self, linears: Sequence[nn.Module]) -> Matrix:
        parts = [part for one in linears if (part := unpacked(one)) is not None]
        assert len(parts) == len(linears), "every matrix is kept in blocks"
        biases = [bias for one in linears if isinstance(bias := one.bias, Tensor)]
        return self._matrix(parts, torch.cat(biases) if biases else None)

    @torch.inference_mode()
    def __call__(
        self,
        caches: Sequence[Tensor],
        ids: Sequence[int],
        positions: Sequence[int],
        pages: Sequence[Sequence[int]],
        slots: Sequence[int],
    ) -> Tensor:
        """Logits float32 [B, V] of B sequences' next token; its keys and values go into the caches.

        caches: a layer's [pages, page_tokens, 2, KV, D]. positions: of the new tokens. pages: of each
        sequence. slots: where the new keys and values go.
        """
        count, context = len(ids), max(positions) + 1
        for layer, held in zip(self._layers, caches, strict=True):
            layer.cache = held.data_ptr()
        decoder, model = self.decoder, self.model
        at = torch.tensor(positions)
        assert decoder.rotary is not None
        cos, sin = (one.view(count, -1) for one in decoder.rotary(at, torch.float32))
        x = decoder.embed(torch.tensor(ids)).float().contiguous()
        most = max(map(len, pages))
        table = torch.tensor([[*one, *[0] * (most - len(one))] for one in pages])
        where = torch.tensor(slots)
        logits = torch.empty(count, self.config.vocab)
        threads = torch.get_num_threads()
        room = self.library.herd_scratch(
            ctypes.byref(model),
            *map(ctypes.c_int64, (count, context, threads)),
        )
        if self._scratch.numel() < room + 64:
            self._scratch = torch.empty(room + 4096, dtype=torch.uint8)
        scratch = (self._scratch.data_ptr() + 63) // 64 * 64
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self.library.herd_step(
            ctypes.byref(model),
            whole(count),
            *(
                pointer(one.data_ptr())
                for one in (x, cos.contiguous(), sin.contiguous(), at, table)
            ),
            whole(most),
            pointer(where.data_ptr()),
            pointer(scratch),
            whole(context),
            whole(threads),
            pointer(logits.data_ptr()),
        )
        return logits


def _alternate(a: Tensor, b: Tensor) -> Tensor:
    """Rows of a and b, a tile of each in turn."""
    shape = (-1, TILE, *a.shape[1:])
    return torch.stack([a.view(shape), b.view(shape)], 1).flatten(0, 2).contiguous()


def step_for(decoder: Decoder, page_tokens: int) -> Step | None:
    """The native step of this decoder; None where it, the processor or the machine does not fit."""
    if not _fits(decoder):
        return None
    found = library()
    return None if found is None else Step(decoder, found, page_tokens)


def _fits(decoder: Decoder) -> bool:
    if type(decoder) is not Decoder:  # RWKV, T5 … are modules of their own
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
