"""A GGUF whose weights the native step reads as they lie there, without torch.

To import torch takes longer than everything else between a command and its first token. What is read
here instead is checked as `load_decoder` checks it; what the file or the request asks for beyond
(an adapter, a draft model, all hidden states) makes a decoder of it then.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from herdbook.engine.compiled import library, processor
from herdbook.engine.native import Blocks, Step, fits, together
from herdbook.files import gguf
from herdbook.model import gguf_config
from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family
from herdbook.model.interface import Model
from herdbook.model.sources import check_names, source_shapes

if TYPE_CHECKING:
    from herdbook.model.decoder import Decoder

#: bytes in front of a block's codes
HEADS = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}


def packaged(path: Path) -> Packaged | None:
    """The model at `path` (what a reference resolved to), where the native step can read it so."""
    file = gguf_config.gguf_file(path)
    if file is None or not file.is_file() or library() is None:
        return None
    found = gguf.read(file)
    family, config, _ = gguf_config.read(found, found.shapes)
    if not fits(config):
        return None
    model = Packaged(path, found, family, config)
    return model if model.whole() else None


class Packaged(Model):
    """The file, understood and checked; the native step's source."""

    place = "cpu"
    soft = None

    def __init__(self, path: Path, file: gguf.GGUF, family: Family, config: DecoderConfig) -> None:
        self.path, self.file, self.config, self.family = path, file, config, family.name
        self._shapes = plain_shapes(config)
        self._names = {name: family.gguf_tensor(name, config) for name in self._shapes}
        self._map: mmap.mmap | None = None
        self._lock = threading.RLock()
        self._step: Step | None = None
        self._decoder: Decoder | None = None
        check_names(file.path, source_shapes(self._shapes, self._names), file.shapes)

    def whole(self) -> bool:
        """Whether every matrix of a block is kept in blocks of 4 or 8 bits along our rows."""
        folds = [self._names[name].fold for name in self._shapes]
        if any(one and (one.transposed or one.stacked or one.plus) for one in folds):
            return False
        kinds = {
            name.removesuffix(".weight"): self._type(name)
            for name, shape in self._shapes.items()
            if name.startswith("blocks.") and len(shape) == 2
        }
        return all(kind in HEADS for kind in kinds.values()) and together(
            {name: _bits(kind) for name, kind in kinds.items()}
        )

    def module(self) -> Decoder:
        with self._lock:
            if self._decoder is None:
                import torch

                from herdbook.model.checkpoint import load_decoder

                self.file.need_same()
                kind = getattr(torch, self.kind)
                self._decoder = load_decoder(self.path, dtype=kind, quantised=True)
            return self._decoder

    @property
    def step(self) -> Step:
        """The native step, for every engine of this model."""
        with self._lock:
            if self._step is None:
                self._step = self._make()
            return self._step

    def _make(self) -> Step:
        found = library()
        assert found is not None, "packaged() has seen it"
        with self.file.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.file.need_same()
            step = Step(self, found)
            if not self._embeds_by_head:
                _ = self._table  # read now: later another file may lie there
            self.file.need_same()
            return step
        finally:
            self._map = None  # unmapped with the last array that looks into it

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Meanwhile the step is made, in another thread."""

        def make() -> None:
            with suppress(Exception):  # it is told where the step is asked for
                _ = self.step

        maker = threading.Thread(target=make)
        maker.start()
        try:
            yield
        finally:
            maker.join()

    @property
    def opened(self) -> bool:
        """Whether it has become a decoder as well."""
        return self._decoder is not None

    @property
    def held_bytes(self) -> int:
        """Of the file's own bytes that stay in memory: the embedding's, unless the head has them."""
        if self._embeds_by_head:
            return 0
        return self.file.tensors[self._names["embed.weight"].name].nbytes

    @property
    def weight_bytes(self) -> int:
        """Of the weights as the native step will keep them, and of the file's bytes that stay."""
        total = self.held_bytes
        for name, shape in self._shapes.items():
            if len(shape) == 1:
                total += 4 * shape[0]
            elif name.startswith("blocks.") or name == self._head:
                total += math.prod(shape) * (_bits(self._type(name)) + 1) // 8
        return total

    @property
    def _head(self) -> str:
        """The name of the weight that gives the logits."""
        return "embed.weight" if self.config.tied else "head.weight"

    @property
    def _embeds_by_head(self) -> bool:
        """Whether the embedding's rows are the head's, just as the step keeps them."""
        return self.config.tied and self._type("embed.weight") == "Q8_0"

    @property
    def kind(self) -> str:
        """As `precision.compute_dtype` decides it."""
        flags = processor().split()
        multiplies = "avx512f" in flags and ("avx512_bf16" in flags or "amx_tile" in flags)
        return "bfloat16" if multiplies else "float32"

    # --- the native step's source ---

    def blocks(self, name: str) -> Blocks:
        weight = self._head if name == "head" else f"{name}.weight"
        if self._type(weight) not in HEADS:
            return Blocks.rounded(self._rows(weight, None))
        return self._blocks(weight)

    def floats(self, name: str) -> np.ndarray | None:
        if name not in self._names:
            return None
        values = self.file.array(self._names[name].name).astype(np.float32).reshape(-1)
        order = self._order(name)
        return values if order is None else values[order]

    def embed(self, ids: np.ndarray) -> np.ndarray | None:
        if self._embeds_by_head:
            return None
        return self._rows("embed.weight", ids)

    def _rows(self, name: str, which: np.ndarray | None) -> np.ndarray:
        """Rows of the embedding or the head, dequantised; None: all."""
        if which is None:
            return gguf.dequantise(self._raw(name), self._type(name)).astype(np.float32, copy=False)
        raw = np.ascontiguousarray(self._table[which])
        return gguf.dequantise(raw, self._type(name)).astype(np.float32, copy=False)

    @cached_property
    def _table(self) -> np.ndarray:
        """The embedding's bytes, [vocab, bytes of a row]."""
        return self.file.raw(self._names["embed.weight"].name)

    def _raw(self, name: str) -> np.ndarray:
        """A matrix's bytes, [rows, bytes of a row]: the file's own pages while the step is made."""
        tensor = self.file.tensors[self._names[name].name]
        if self._map is None:
            return self.file.raw(tensor.name)
        found = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        return found.reshape(*tensor.shape[:-1], -1)

    def _type(self, name: str) -> str:
        return self.file.tensors[self._names[name].name].type

    def _order(self, name: str) -> np.ndarray | None:
        """The source's row of each of ours; None: ours are the source's."""
        source = self._names[name]
        if source.fold is None:
            return None
        rows = [self._shapes[one][0] for one in source.ours]
        every = np.arange(sum(rows))
        found: np.ndarray = source.fold.take(every, source.ours.index(name), rows, self.config)
        return found

    def _blocks(self, name: str) -> Blocks:
        kind, head = self._type(name), HEADS[self._type(name)]
        raw = self._raw(name)
        raw = raw.reshape(len(raw), self._shapes[name][1] // gguf.BLOCK, -1)
        floats = raw[..., :head].view(np.float16)
        codes, scale, order = raw[..., head:], floats[..., 0], self._order(name)
        if kind == "Q8_0":
            return Blocks(codes.view(np.int8), scale, order=order)
        minimum = floats[..., 1] if kind == "Q4_1" else scale * np.float16(-8)
        return Blocks(codes, scale, minimum, order)


def _bits(kind: str) -> int:
    """Of a code, as the native step keeps such a matrix."""
    return 4 if kind in ("Q4_0", "Q4_1") else 8


def plain_shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Our name → shape, for every tensor of a decoder that `fits`."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (c.vocab, c.hidden)}

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    wide = c.heads * c.head_dim
    for at in (f"blocks.{n}." for n in range(c.layers)):
        shapes[f"{at}attention_norm.weight"] = (c.hidden,)
        linear(f"{at}attention.q", c.hidden, wide, c.qkv_bias)
        for one in "kv":
            linear(f"{at}attention.{one}", c.hidden, c.kv_heads * c.head_dim, c.qkv_bias)
        linear(f"{at}attention.o", wide, c.hidden, c.out_bias)
        if c.qk_norm:
            for one in "qk":
                shapes[f"{at}attention.{one}_norm.weight"] = (c.head_dim,)
        shapes[f"{at}mlp_norm.weight"] = (c.hidden,)
        linear(f"{at}mlp.gate", c.hidden, c.ffn, c.mlp_bias)
        linear(f"{at}mlp.up", c.hidden, c.ffn, c.mlp_bias)
        linear(f"{at}mlp.down", c.ffn, c.hidden, c.mlp_bias)
    shapes["norm.weight"] = (c.hidden,)
    if not c.tied:
        shapes["head.weight"] = (c.vocab, c.hidden)
    return shapes
