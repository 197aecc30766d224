"""What a tuning run will hold in memory, by part, before anything of it is loaded.

    model's headers + settings + the fullest pack  →  weights · gradients · optimiser · activations · work

Weights, gradients and the optimiser's state are exact: the decoder is laid out on the meta device,
which has shapes and no bytes, and given its adapters there. Activations are what autograd keeps: the
pack goes through that decoder, and every tensor kept for the way back is counted once. So a new
method or family is planned for without a formula of its own.

The moments at which most is held:

    packs      weights + optimiser + activations + gradients (where a step has one pack they grow as
               activations go, and take their places where these are large enough) + the head's work
    the step   weights + optimiser + gradients + the optimiser's work
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from herdbook.model import blockwise, nf4
from herdbook.model.checkpoint import Checkpoint
from herdbook.model.checkpoint.compressed import CompressedWeights
from herdbook.model.checkpoint.weights import GGUFWeights
from herdbook.model.decoder import Decoder
from herdbook.model.frozen import frozen_linear
from herdbook.model.layers import BLOCK, Int4Linear, Int8Embedding, Int8Linear, Linear
from herdbook.model.lora import replace
from herdbook.model.modules import build
from herdbook.model.precision import compute_dtype
from herdbook.model.streamed import held_bytes
from herdbook.training import adamw8, loss, methods
from herdbook.training.activations import Load, activations, rough_activations
from herdbook.training.parallel import Split

if TYPE_CHECKING:
    from herdbook.training.tune import Tune

#: what torch's kernels take once they have run, and what the allocator loses between tensors that come
#: and go, as a share of these: both measured (`make plan-bench`)
KERNELS = {torch.bfloat16: 145 * 2**20, torch.float32: 45 * 2**20}
SLACK = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes at the fullest moment, by part."""

    #: Python, its libraries, the rows: what is held before the model is loaded
    process: int
    weights: int
    gradients: int
    optimiser: int
    activations: int
    #: logits of a chunk, a matrix made dense, the optimiser's second copies, the kernels' own
    work: int

    @property
    def peak(self) -> int:
        return sum(getattr(self, one.name) for one in fields(self))


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk: what is made, the states that a killed run goes on from (two while one
    replaces the other), and what lies there in place of memory."""

    result: int
    states: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        return self.result + self.states + self.offloaded


def disk_of(checkpoint: Checkpoint, how: Tune) -> Disk:
    decoder = lay_out(checkpoint, how)
    trained = methods.prepare(decoder, how)
    moved = 4 * sum(w.numel() for w in trained.values())
    whole = sum(w.nbytes for w in decoder.parameters())
    kept = _state_bytes(how, trained)
    offloaded = kept if "optimiser" in how.offload else 0
    return Disk(whole if how.kind == "model" else moved, 2 * (moved + kept), offloaded)


def memory_of(
    checkpoint: Checkpoint,
    how: Tune,
    load: Load,
    process: int,
    rough: bool = False,
    processes: int = 1,
) -> Memory:
    """Arithmetic alone; some tenths of a second whatever the model's size.

    process: bytes held before the model is loaded. rough: a bound from above by a formula, in no time.
    processes: that share the run as `how.parallel` says; the memory is one's.
    """
    decoder = lay_out(checkpoint, how)
    trained = methods.prepare(decoder, how)
    sizes = [w.numel() for w in trained.values()]
    gradients = 4 * sum(sizes)
    held = held_bytes(decoder, streamed="base" in how.offload)
    if how.precision == "mixed":  # laid out as float32, computed in a bfloat16 copy
        held += 2 * sum(sizes)
        decoder.to(torch.bfloat16)
    kept, block = (rough_activations if rough else activations)(decoder, load)
    if how.recomputes:
        first = decoder.config.hidden * load.tokens * decoder.dtype.itemsize
        kept = min(kept, first * len(decoder.blocks) + block)
    head = _head_work(decoder, load)
    # a freed activation makes room for a gradient that is no larger
    reused = load.tokens * decoder.dtype.itemsize >= 4 * decoder.config.hidden
    added = load.several or not reused
    in_packs = (kept + gradients if added else max(kept, gradients)) + head + block
    in_step = gradients + _step_work(how, sizes)
    most = max(in_packs, in_step)
    held_then = gradients if added or in_step > in_packs else 0
    work = head + block if in_packs >= in_step else most - gradients
    alone = Memory(
        process=process,
        weights=held,
        gradients=held_then,
        optimiser=_state_bytes(how, trained, max if "optimiser" in how.offload else sum),
        activations=most - held_then - work,
        work=work + KERNELS[decoder.dtype] + int(SLACK * (most - held_then)),
    )
    return alone if processes == 1 else _share(alone, Split.read(how.parallel), decoder, processes)


def _share(alone: Memory, split: Split, decoder: Decoder, processes: int) -> Memory:
    """What each of several processes holds of what one alone would (see training/parallel.py).

    All load the whole model before they give shares away, and the first one holds it again beside its
    share at the end. Activations of a pack that two compute together are counted whole.
    """
    blocks = sum(w.nbytes for w in decoder.blocks.parameters())
    inside = blocks / max(1, sum(w.nbytes for w in decoder.parameters()))
    own = 1 - inside + inside / split.tensor  # of weights, gradients and moments, what is not split
    work = alone.work
    if split.sharded and processes > split.ways:
        own /= processes // split.ways
        work += 2 * blocks // len(decoder.blocks)  # a block while it computes, and the next
    moved = own / split.stages
    share = dataclasses.replace(
        alone,
        weights=int(alone.weights * own),  # all stages keep them
        gradients=int(alone.gradients * moved),
        optimiser=int(alone.optimiser * moved),
        activations=alone.activations // split.stages,
        work=work,
    )
    ends = alone.process + alone.weights + (share.weights if own < 1 else 0)
    if ends <= share.peak:
        return share
    return Memory(alone.process, ends - alone.process, 0, 0, 0, 0)


def lay_out(checkpoint: Checkpoint, how: Tune) -> Decoder:
    """The decoder that `Tune` will load, on the meta device: same layers, same types, no bytes."""
    dtype = dtype_of(how)
    with torch.device("meta"):
        decoder = build(checkpoint.config, headless=checkpoint.headless).to(dtype)
    decoder.requires_grad_(False)
    decoder.family = checkpoint.family.name
    for name, module in list(decoder.named_modules()):
        if how.kept == "dense" or name.endswith(".router"):
            continue
        inside = name.startswith("blocks.")
        if not isinstance(module, Linear) and module is not decoder.embed:
            continue
        if how.kept == "nf4":
            made = _nf4(module, dtype) if inside and isinstance(module, Linear) else None
        else:
            made = _packaged(checkpoint, name, module, dtype)
        if made is not None:
            replace(decoder, name, made)
    return decoder


def dtype_of(how: Tune) -> torch.dtype:
    """What the weights are loaded as."""
    if how.precision == "bfloat16":
        return torch.bfloat16
    return torch.float32 if how.kind == "model" else compute_dtype()


class _Few(nn.Module):
    """A matrix in few bits, as far as memory goes: its buffers' bytes, and what it is multiplied as."""

    def __init__(
        self, linear: Linear, parts: Sequence[tuple[int, torch.dtype]], dtype: Any
    ) -> None:
        super().__init__()
        self.outputs, self.inputs, self.dtype = linear.outputs, linear.inputs, dtype
        self.bias = linear.bias
        for number, (size, of) in enumerate(parts):
            self.register_buffer(f"part{number}", torch.empty(size, dtype=of, device="meta"))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.outputs, self.inputs, dtype=dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)


def _nf4(linear: Linear, dtype: torch.dtype) -> nn.Module:
    blocks = -(-linear.outputs * linear.inputs // nf4.BLOCK)
    parts = [
        (blocks * nf4.BLOCK // 2, torch.uint8),
        (blocks, torch.uint8),
        (-(-blocks // blockwise.BLOCK), torch.float32),
        (1, torch.float32),
    ]
    return _Few(linear, parts, dtype)


def _packaged(
    checkpoint: Checkpoint, name: str, module: nn.Module, dtype: torch.dtype
) -> nn.Module | None:
    """As `load_decoder` keeps a matrix that its file has in 4 or 8 bits."""
    source = checkpoint.names[f"{name}.weight"]
    if source.fold is not None and source.fold.transposed:
        return None
    weights = checkpoint.weights
    if isinstance(weights, GGUFWeights):
        bits = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}.get(weights.file.tensors[source.name].type)
    elif isinstance(weights, CompressedWeights):
        bits = weights.schemes[source.name].bits if source.name in weights.schemes else None
    else:
        bits = None
    if bits is None:
        return None
    rows, columns = checkpoint.shapes[f"{name}.weight"]
    count = columns // BLOCK
    with torch.device("meta"):
        bias = getattr(module, "bias", None)
        if bits == 8:
            codes, scale = (
                torch.empty(rows, count, BLOCK, dtype=torch.int8),
                torch.empty(rows, count),
            )
            if isinstance(module, Linear):
                return Int8Linear(codes, scale, bias, dtype)
            return Int8Embedding(codes, scale, None, dtype)
        if not isinstance(module, Linear):
            return None
        half = torch.empty(rows, count, dtype=torch.float16)
        few = torch.empty(rows, count, BLOCK // 2, dtype=torch.uint8)
        made = Int4Linear(few, half, half.clone(), bias, dtype)
    made.has_kernel = False
    return made


# --- work and states -------------------------------------------------------------------------------


def _head_work(decoder: Decoder, load: Load) -> int:
    """Of the loss: logits of a chunk in the model's type and in float32, the gradient of the hidden
    states, and of the head's matrix where it is trained (as made, and as multiplied)."""
    c = decoder.config
    width = c.embed_dim or c.hidden
    rows = min(max(load.trained, 1), max(16, loss.CHUNK_BYTES // (c.vocab * 4)))
    if not c.plain_head:
        rows = max(load.trained, 1)
    logits = rows * c.vocab * (4 + 2 * decoder.dtype.itemsize)
    hidden = 2 * load.tokens * c.hidden * decoder.dtype.itemsize
    head = decoder.head_layer
    matrix = 0
    if any(one.requires_grad for one in head.parameters()):
        matrix = (2 * 4 + decoder.dtype.itemsize % 4) * c.vocab * width
    elif getattr(head, "weight", None) is None:
        matrix = 2 * c.vocab * width * decoder.dtype.itemsize
    return logits + hidden + matrix


def _step_work(how: Tune, sizes: Sequence[int]) -> int:
    """Of the optimiser: what it makes besides its state, for the largest weight at a time."""
    largest = 4 * max(sizes)
    work = {"adamw": 0, "adamw8": 8 * adamw8.STRIP, "lion": largest, "adafactor": 2 * largest}
    return work[how.optimiser] + (7 * largest // 2 if how.precision == "bfloat16" else 0)


def _state_bytes(
    how: Tune, trained: dict[str, nn.Parameter], of: Callable[[Iterator[int]], int] = sum
) -> int:
    """What the optimiser keeps of all trained weights between steps (of max: of the largest)."""
    return of(_state_of(how, tuple(w.shape)) for w in trained.values())


def _state_of(how: Tune, shape: tuple[int, ...]) -> int:
    size = math.prod(shape)
    if how.optimiser == "adafactor":
        rest = math.prod(shape[:-2])
        factored = len(shape) > 1
        kept = 4 * rest * (shape[-2] + shape[-1]) if factored else 4 * size
    elif how.optimiser == "adamw8" and size >= adamw8.SMALL:
        kept = 2 * (size + 4 * -(-size // blockwise.BLOCK))
    else:
        kept = 4 * size if how.optimiser == "lion" else 8 * size
    return kept + (4 * size if how.average else 0)
