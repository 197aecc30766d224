"""The engine's step as machine code (native.cpp): weights of 4 or 8 bits on the CPU.

What it serves: LLaMA-shaped decoders on the CPU whose matrices are kept in 4 or 8 bits, where the
processor has AVX2 (better: AVX-512 VNNI) and the machine a C++ compiler. Everything else goes the
PyTorch way, which is also its twin in the tests. The weights are the packaged ones, not quantised
again; the inputs of each product are rounded to 8 bits in blocks of 32, as llama.cpp does.

Nothing here needs torch: a model that lies in a file packaged so is served without it
(packaged.py), and starts in a fraction of the time.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from herdbook.engine.compiled import threads
from herdbook.files.gguf import BLOCK
from herdbook.model.config import DecoderConfig
from herdbook.model.rope import rope_frequencies, rope_magnitude

if TYPE_CHECKING:
    from herdbook.engine.store import Store

TILE = 16
#: up to here a model is packed by one thread: the other cores are busy with what else a start needs
ALONE_BYTES = 2**28


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


class Job(ctypes.Structure):
    """A matrix for native.cpp to pack."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("block_bytes", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("scale_row", ctypes.c_int64),
        ("scale_block", ctypes.c_int64),
        ("minimums", ctypes.c_void_p),
        ("minimum_row", ctypes.c_int64),
        ("minimum_block", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "blocks", "bits")),
        ("out", ctypes.c_void_p),
        ("step", ctypes.c_int64),
    ]


class Span(NamedTuple):
    """What a step computes of one sequence: these tokens, from place `start` on."""

    ids: Sequence[int]
    start: int
    pages: Sequence[int]
    wanted: int = 1  # logits are wanted after so many of them, the last ones


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks of 32 neighbours of a row: weight = scale · code + minimum.

    codes: uint8 [R, B, 16] (byte i: value i in its low half, i + 16 in its high), or int8
    [R, B, 32], whose minimum is 0. scale, minimum [R, B]. order: which row of theirs each of the
    matrix's rows is; None: the same one.
    """

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None = None
    order: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return len(self.codes if self.order is None else self.order)

    @property
    def bits(self) -> int:
        return int(self.codes.shape[2]) // 4

    @property
    def tile_bytes(self) -> int:
        return int(self.codes.shape[1]) * (self.bits + 1) * 64

    @classmethod
    def rounded(cls, weight: np.ndarray) -> Blocks:
        """weight [R, I] in 8 bits; one that came from such blocks gets its very codes again."""
        codes = np.empty((len(weight), weight.shape[1] // BLOCK, BLOCK), np.int8)
        scale = np.empty(codes.shape[:2], np.float32)
        for at in range(0, len(weight), 1024):
            some = (
                weight[at : at + 1024].astype(np.float32, copy=False).reshape(-1, *codes.shape[1:])
            )
            scale[at : at + 1024] = np.abs(some).max(-1) / 127
            step = np.maximum(scale[at : at + 1024], 1e-30)[..., None]
            codes[at : at + 1024] = np.rint(some / step)
        return cls(codes, scale)


class Source(Protocol):
    """Where the step's weights come from; names are the decoder's."""

    config: DecoderConfig

    def blocks(self, name: str) -> Blocks:
        """The matrix of a module; of "head", what gives the logits, tied or not."""
        ...

    def floats(self, name: str) -> np.ndarray | None:
        """A vector (a norm's weight, a bias), float32; None where there is none."""
        ...

    def embed(self, ids: np.ndarray) -> np.ndarray | None:
        """Rows of the embedding, float32 [T, hidden]; None: they are the head's, just as it keeps
        them."""
        ...


def aligned(size: int) -> np.ndarray:
    """So many bytes from a multiple of 64 on: a register's load stays within a line of the cache."""
    room = np.empty(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size]


def together(bits: Mapping[str, int]) -> bool:
    """Whether matrices that are one product have as many bits. bits: of each matrix, by its name."""
    return all(
        len({bits[name] for name in names}) == 1
        for at in sorted({name.rpartition(".")[0].rpartition(".")[0] for name in bits})
        for names in (
            [f"{at}.attention.{one}" for one in "qkv"],
            [f"{at}.mlp.gate", f"{at}.mlp.up"],
        )
    )


class Packing:
    """Matrices to become the tiles that native.cpp reads, all in one call, beside which other threads
    of Python's run undisturbed."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._bytes = 0  # of the tiles
        self._read: list[Any] = []  # what the jobs point into

    def add(self, parts: Sequence[Blocks], alternate: bool = False) -> np.ndarray:
        """Tiles uint8 [tiles, bytes], filled by `run`: of one matrix after another, or alternate: one
        of each in turn."""
        count, size = sum(one.rows for one in parts) // TILE, parts[0].tile_bytes
        assert len({one.tile_bytes for one in parts}) == 1, "tiles of one size"
        out = aligned(count * size).reshape(count, size)
        self._bytes += out.nbytes
        at = 0
        for one in parts:
            scale, minimum = one.scale, one.minimum
            if minimum is None:  # bytes become those from 0 to 255
                minimum = scale.astype(np.float32) * -128
            half = [some.astype(np.float16, copy=False) for some in (scale, minimum)]
            order = None if one.order is None else np.ascontiguousarray(one.order, np.int64)
            assert one.codes.strides[2] == 1, "a block's bytes lie side by side"
            self._read += [one.codes, half, order]
            self._jobs.append(
                Job(
                    one.codes.ctypes.data,
                    *one.codes.strides[:2],
                    *(number for some in half for number in (some.ctypes.data, *some.strides)),
                    None if order is None else order.ctypes.data,
                    *(one.rows, one.codes.shape[1], one.bits),
                    *(out.ctypes.data + at * size, size * (len(parts) if alternate else 1)),
                )
            )
            at += 1 if alternate else one.rows // TILE
        return out

    def run(self, library: ctypes.CDLL) -> None:
        jobs = (Job * len(self._jobs))(*self._jobs)
        team = threads() if self._bytes > ALONE_BYTES else 1
        library.herd_pack(jobs, *map(ctypes.c_int64, (len(jobs), team)))


class Step:
    """The step of one decoder."""

    def __init__(self, source: Source, library: ctypes.CDLL) -> None:
        c = source.config
        self.library, self.config = library, c
        self.kept: list[np.ndarray] = []  # what the structures point into
        self.frequencies, self.magnitude = rope_frequencies(c), rope_magnitude(c)
        self._source, packing = source, Packing()
        self._layers = (Layer * c.layers)()
        for number, layer in enumerate(self._layers):
            self._fill(layer, number, packing)
        norm = source.floats("norm.weight")
        assert norm is not None
        self._norm = norm
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
            norm=self._keep(norm),
            head=self._matrix(packing, [source.blocks("head")], []),
        )
        packing.run(library)
        self._head = self.kept[-1]
        self._only_head = Model.from_buffer_copy(self.model)
        self._only_head.layers = 0
        self._scratch = np.empty(0, np.uint8)
        self._lock = threading.Lock()  # two engines may have it, each in its thread

    @property
    def nbytes(self) -> int:
        """Of the weights as they are kept here."""
        return sum(one.nbytes for one in self.kept)

    def _keep(self, array: np.ndarray | None) -> int | None:
        if array is None:
            return None
        self.kept.append(np.ascontiguousarray(array))
        return int(self.kept[-1].ctypes.data)

    def _matrix(
        self,
        packing: Packing,
        parts: Sequence[Blocks],
        biases: Sequence[np.ndarray],
        alternate: bool = False,
    ) -> Matrix:
        tiles = packing.add(parts, alternate)
        bias = None
        if biases and alternate:
            bias = np.stack([one.reshape(-1, TILE) for one in biases], 1)
        elif biases:
            bias = np.concatenate(biases)
        columns = parts[0].codes.shape[1] * BLOCK
        return Matrix(
            self._keep(tiles), self._keep(bias), len(tiles) * TILE, columns, parts[0].bits
        )

    def _fill(self, layer: Layer, number: int, packing: Packing) -> None:
        at, floats = f"blocks.{number}.", self._source.floats
        layer.attention_norm = self._keep(floats(f"{at}attention_norm.weight"))
        layer.mlp_norm = self._keep(floats(f"{at}mlp_norm.weight"))
        layer.q_norm = self._keep(floats(f"{at}attention.q_norm.weight"))
        layer.k_norm = self._keep(floats(f"{at}attention.k_norm.weight"))
        layer.qkv = self._joined(packing, [f"{at}attention.{one}" for one in "qkv"])
        layer.o = self._joined(packing, [f"{at}attention.o"])
        layer.gate_up = self._joined(packing, [f"{at}mlp.gate", f"{at}mlp.up"], alternate=True)
        layer.down = self._joined(packing, [f"{at}mlp.down"])
        layer.window = self.config.window(number) or 0

    def _joined(self, packing: Packing, names: Sequence[str], alternate: bool = False) -> Matrix:
        biases = [self._source.floats(f"{name}.bias") for name in names]
        given = [one for one in biases if one is not None]
        assert len(given) in (0, len(names)), names
        parts = [self._source.blocks(name) for name in names]
        return self._matrix(packing, parts, given, alternate)

    def __call__(self, store: Store, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [R, V] after the tokens that want them, and what the last layer gives
        [T, hidden], before the norm; keys and values go into the store."""
        with self._lock:
            return self._compute(store, spans)

    def _compute(self, store: Store, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        model, size = self.model, store.page_tokens
        model.page_tokens, model.cache_bytes = size, store.itemsize
        for layer, keys, values in zip(self._layers, store.keys, store.values, strict=True):
            layer.keys, layer.values = keys.ctypes.data, values.ctypes.data
        for layer, scales in zip(self._layers, store.scales, strict=False):
            layer.scales = scales.ctypes.data
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
        table = [[*one.pages[:most], *[0] * (most - len(one.pages))] for one in spans]
        whole = [np.array(one, np.int64) for one in (positions, slots, firsts, table, wants)]
        angle = whole[0].astype(np.float32)[:, None] * self.frequencies
        cos, sin = np.cos(angle) * self.magnitude, np.sin(angle) * self.magnitude
        turns = [
            np.ascontiguousarray(np.concatenate(two, 1), np.float32)
            for two in ((cos, cos), (-sin, sin))
        ]
        x = np.ascontiguousarray(self.embed(np.array(ids, np.int64)), np.float32)
        logits = np.empty((len(wants), self.config.vocab), np.float32)
        self._run(model, (len(spans), most), context, x, *turns, *whole, logits)
        return logits, x

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the embedding, float32 [T, hidden]."""
        found = self._source.embed(ids)
        return self._head_rows(ids) if found is None else found

    def _head_rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of the head's matrix of 8 bits, as its tiles hold them."""
        blocks = self.config.hidden // BLOCK
        tiles = self._head[ids // TILE].reshape(len(ids), blocks, -1)  # [T, B, 576]
        mine = np.arange(len(ids)), slice(None)
        codes = tiles[..., : TILE * BLOCK].reshape(len(ids), blocks, BLOCK // 4, TILE, 4)
        codes = codes[*mine, :, ids % TILE].reshape(len(ids), blocks, BLOCK)
        scales = tiles[..., TILE * BLOCK :][..., : 2 * TILE].copy().view(np.float16)
        scale = scales[*mine, ids % TILE].astype(np.float32)
        found: np.ndarray = (codes.astype(np.float32) - 128) * scale[..., None]
        return found.reshape(len(ids), -1)

    def finish(self, x: np.ndarray) -> np.ndarray:
        """Rows that the last layer gave, [R, hidden], after the final norm."""
        mean = (x * x).mean(-1, keepdims=True)
        found: np.ndarray = x / np.sqrt(mean + np.float32(self.config.eps)) * self._norm
        return found

    def head(self, x: np.ndarray) -> np.ndarray:
        """Logits float32 [R, V] of rows that the last layer gave, [R, hidden]: what a step gives them."""
        x, nothing = x.copy(), np.zeros(1, np.int64)
        logits = np.empty((len(x), self.config.vocab), np.float32)
        every = np.arange(len(x), dtype=np.int64)
        with self._lock:
            self._run(self._only_head, (0, 0), 1, x, x, x, *[nothing] * 4, every, logits)
        return logits

    def _run(
        self, model: Model, sizes: tuple[int, int], context: int, x: np.ndarray, *others: np.ndarray
    ) -> None:
        """sizes: sequences, most pages of one. The last two of `others` are wanted and logits."""
        team = threads()
        room = self.library.herd_scratch(
            ctypes.byref(model), *map(ctypes.c_int64, (len(x), context, team))
        )
        if self._scratch.size < room + 64:
            self._scratch = np.empty(room + 64, np.uint8)
        pointers = [one.ctypes.data for one in (x, *others)]
        scratch = (self._scratch.ctypes.data + 63) // 64 * 64
        batch = Batch(len(x), *sizes, len(others[-1]), context, team, *pointers, scratch)
        self.library.herd_step(ctypes.byref(model), ctypes.byref(batch))


def fits(c: DecoderConfig) -> bool:
    """Whether native.cpp computes such a decoder."""
    if type(c) is not DecoderConfig:  # T5, RWKV … are modules of their own
        return False
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
    sizes = (c.hidden, c.heads * c.head_dim, c.ffn)
    rows = (*sizes, c.kv_heads * c.head_dim, c.vocab)
    even = not any(size % BLOCK for size in sizes) and not any(one % TILE for one in rows)
    return c == plain and even and c.head_dim % TILE == 0
