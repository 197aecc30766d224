"""Few bits a weight: in one GGUF file, which llama.cpp reads as well, or in a Hugging Face folder as
compressed-tensors, which transformers and vLLM read (`layers`). The latter holds every family.

What came from a Q4_1 file and was not tuned lies on Q4_1's grid already: it is found so, and goes
back bit by bit. What tuning moved has to be rounded anew, and there a tuned model is in a special
danger: tuning moves a weight by a few hundredths of a step, so plain rounding puts nearly every
weight back to where it was before, and the model forgets what it was taught. Measured on
SmolLM2-135M, 36 steps of LoRA that teach it a name; loss on sentences about the name, perplexity on
WikiText-2 against the merged model:

    base 3.88 · merged, float32 0.20 · rounded 3.33 (perplexity −2 %: it is the base again)
    · compensated on other text 2.34
    with an adapter of group 32 (see `model.lora`), rank 16, twice the rate:
    merged, float32 0.0934 · rounded 0.0933 (perplexity −0.01 %)

So an adapter that is meant for four bits is trained with `group` = 32, which keeps the grid. Other
tuned matrices are rounded with compensation (see `int4`), on conversations the model was tuned on,
which keeps a part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from herdbook.book.step import Bench, Input, Step, require
from herdbook.compression import int4, parity
from herdbook.compression.layers import quantise_layers
from herdbook.data import records
from herdbook.errors import ConfigError
from herdbook.model.checkpoint import (
    gguf_head,
    load_decoder,
    need_rows,
    open_checkpoint,
    save_compressed,
    save_gguf,
)
from herdbook.model.decoder import Block, Decoder
from herdbook.model.layers import Int4Linear
from herdbook.model.layout import Packed
from herdbook.model.mlp import MLP
from herdbook.tokens.chat import Rendering, render
from herdbook.tokens.packing import Pack, pack
from herdbook.tokens.tokenizer import Tokenizer

TABLES = ("embed.weight", "head.weight")
#: a matrix nearer than this to Q4_1's grid lies on it, but for the float16 of a minimum
ON_GRID_STEPS = 0.02


@dataclass(frozen=True)
class Quantise(Step):
    """Write a model with 4 or 8 bits a weight."""

    kind: ClassVar[str] = "model"
    changes: ClassVar[tuple[str, ...]] = ("model",)

    model: Input = ""
    #: a GGUF file: Q4_1 (5 bits a weight, embedding and head 8.5), Q8_0 (8.5), Q4_0 (4.5, rounded
    #: plainly). A Hugging Face folder, for every family: int4 (4.625), int8 (8.5), both rounded
    #: plainly, embedding and head of 16 bits
    format: Literal["Q4_1", "Q8_0", "Q4_0", "int4", "int8"] = "Q4_1"
    #: tokens of the conversations that the model was tuned on, to weigh errors with (Q4_1)
    calibration_tokens: int = 4096

    def check_model(self, path: Path) -> None:
        """Raise where this format cannot hold such a model."""
        found = open_checkpoint(path)
        if self._folder:
            need_rows(found.family)
        else:
            tokenizer = Tokenizer.load(path) if Tokenizer.exists(path) else None
            gguf_head(found.config, found.family, tokenizer)

    @property
    def _folder(self) -> bool:
        return self.format in ("int4", "int8")

    def make(self, bench: Bench) -> dict[str, Any]:
        require(self, "model")
        source = bench.artifact("model")
        if source.kind != "model":
            raise ConfigError(
                f"{source.ref} is an {source.kind}",
                rule="and only a model can be quantised",
                next="merge the adapter into its base first (step Merge)",
            )
        self.check_model(source.path)
        tokenizer = Tokenizer.load(source.path)
        decoder = load_decoder(source.path, dtype=torch.float32, quantised=self._folder)
        for layer in decoder.modules():
            if isinstance(layer, Int4Linear):
                layer.has_kernel = False  # it computes in bfloat16
        before = parity.text_logits(decoder, tokenizer)
        if self._folder:
            path = bench.out
            found = self._as_folder(decoder, tokenizer, source.path, path)
        else:
            path = bench.out / "model.gguf"
            found = self._as_gguf(decoder, tokenizer, path, bench)
        parameters = decoder.parameter_count()
        written = parity.check_written(decoder, path, self.format)
        del decoder
        saved = load_decoder(path, dtype=torch.float32)
        after = parity.compare(before, parity.text_logits(saved, tokenizer))
        size = sum(file.stat().st_size for file in open_checkpoint(path).weights.files)
        return {
            "size_bytes": size,
            "bits_per_weight": round(size * 8 / parameters, 3),
            "parameters": parameters,
            "rounding_share": written,
            "mean_kl": after.mean_kl,
            "top1_agreement_share": after.top1_agreement,
            "max_logit_difference": after.max_logit_difference,
            **found,
        }

    def _as_gguf(
        self, decoder: Decoder, tokenizer: Tokenizer, path: Path, bench: Bench
    ) -> dict[str, Any]:
        matrices = sum(len(group) for block in decoder.blocks for group in readers(block))
        kept = 0
        if self.format == "Q4_1":
            packs = calibration(bench, tokenizer, self.calibration_tokens)
            kept = round_to_q4_1(decoder, packs, bench.progress.say)
            bench.progress.say(f"{kept} of {matrices} matrices lie on the grid already")
        save_gguf(decoder, tokenizer, path, self.format)
        return {"matrices": matrices, "exact_matrices": kept}

    def _as_folder(
        self, decoder: Decoder, tokenizer: Tokenizer, source: Path, path: Path
    ) -> dict[str, Any]:
        done = quantise_layers(decoder, int(self.format.removeprefix("int")))
        of = open_checkpoint(source).dtype
        save_compressed(decoder, tokenizer, path, lambda name: beside(name, of(name)))
        share = {"rounding_share": done.share} if done.exact < done.matrices else {}
        return {"matrices": done.matrices, "exact_matrices": done.exact, **share}


def beside(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor that is not quantised is kept in: the embedding and the head in 16 bits, as they
    are most of what is left; the rest as it came."""
    return torch.float16 if name in TABLES and dtype.itemsize > 2 else dtype


def calibration(bench: Bench, tokenizer: Tokenizer, tokens: int) -> list[Pack]:
    """About so many tokens of the conversations in the model's pedigree; none where it has none."""
    datasets = [a for a in bench.book.ancestors(bench.artifact("model")) if a.kind == "dataset"]
    rows = [
        row.messages
        for one in datasets
        for row in records.stream(one.path / "train.jsonl")
        if not isinstance(row, records.Document)
    ]
    random.Random(0).shuffle(rows)
    chosen: list[Rendering] = []
    for messages in rows:
        if tokens <= 0:
            break
        row = render(tokenizer, messages)
        tokens -= len(row.ids)
        chosen.append(row)
    if not chosen:
        return []
    packs, _ = pack(chosen, max(1024, *(len(row.ids) for row in chosen)))
    return packs


@torch.no_grad()
def round_to_q4_1(
    decoder: Decoder, packs: Sequence[Pack], say: Callable[[str], None] = lambda text: None
) -> int:
    """Put every matrix of the blocks on Q4_1's grid, in place; how many lay there already.

    With packs, what has to move is compensated for, block after block, each block's errors weighed
    by the inputs it gets in the original model. Without any it is rounded to the nearest point.
    """
    ids = [torch.tensor(one.ids, device=decoder.device) for one in packs]
    layouts = [Packed(one.lengths, decoder.device) for one in packs]
    states = [decoder.start(some, layout) for some, layout in zip(ids, layouts, strict=True)]
    kept = plain = 0
    for at, block in enumerate(decoder.blocks):
        assert isinstance(block, Block)
        with watching(block) as moments:
            for number, (state, layout) in enumerate(zip(states, layouts, strict=True)):
                states[number] = decoder.through(state, layout, at, at + 1)
        for group in readers(block):
            spread: Tensor | None = None
            for name in group:
                linear = block.get_submodule(name)
                weight = linear.weight
                assert isinstance(weight, Tensor)
                if weight.shape[1] % int4.GROUP:
                    continue  # the file keeps such a matrix as F16
                nearest = int4.nearest(weight)
                if torch.equal(nearest, weight):
                    kept += 1
                elif int4.distance(weight, nearest) < ON_GRID_STEPS:
                    weight.copy_(nearest)
                elif group[0] in moments:
                    spread = int4.factor(moments[group[0]]) if spread is None else spread
                    weight.copy_(int4.compensated(weight, spread))
                else:
                    weight.copy_(nearest)
                    plain += 1
    if plain:
        say(f"{plain} matrices rounded plainly: no conversations in the model's pedigree")
    return kept


def readers(block: nn.Module) -> list[list[str]]:
    """A block's matrices, those that read the same inputs together (they are seen at the first)."""
    attention = [["attention.q", "attention.k", "attention.v"], ["attention.o"]]
    mlps = [
        group
        for name, mlp in block.named_modules()
        if isinstance(mlp, MLP)
        for group in (
            [f"{name}.gate", f"{name}.up"] if mlp.gate is not None else [f"{name}.up"],
            [f"{name}.down"],
        )
    ]
    return attention + mlps


@contextmanager
def watching(block: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While open, adds up XᵀX of what each group's first matrix reads: name → [I, I]."""
    moments: dict[str, Tensor] = {}
    handles = []
    for group in readers(block):

        def add(module: nn.Module, inputs: tuple[Tensor, ...], name: str = group[0]) -> None:
            (x,) = inputs  # [T, I]
            moments[name] = moments.get(name, 0) + x.T @ x

        handles.append(block.get_submodule(group[0]).register_forward_pre_hook(add))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
