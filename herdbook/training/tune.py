"""Tune a model on conversations: an adapter, or weights of its own (a new model).

    Tune(model="smollm2", data=("identity", "retention"), rank=8, learning_rate=1e-3).run(book)

One conversation of the data is one row. `batch` counts rows per optimiser step and `length` the
most tokens a row may have, so published hyperparameters are written down literally (Stanford
Alpaca: batch 128, length 512); how rows are then packed for the machine (`pack`) changes nothing
but speed and memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from herdbook.book.book import Artifact
from herdbook.book.step import HOW, Bench, How, Input, Inputs, Step, require
from herdbook.errors import ConfigError
from herdbook.files import atomic
from herdbook.model.checkpoint import load_decoder, save_hf
from herdbook.model.decoder import Decoder
from herdbook.model.gguf_config import gguf_file
from herdbook.model.layers import Int4Linear, Int8Linear
from herdbook.model.lora import merge_lora
from herdbook.model.precision import compute_dtype
from herdbook.model.streamed import held_bytes
from herdbook.progress import Progress
from herdbook.tokens.chat import Rendering
from herdbook.tokens.tokenizer import Tokenizer
from herdbook.training import (
    fitting,
    loop,
    memory,
    methods,
    mixing,
    parallel,
    peft_format,
    processes,
)
from herdbook.training.loop import Plan
from herdbook.training.objective import NextToken
from herdbook.training.rows import Rows, gather


@dataclass(frozen=True)
class Tune(Step):
    """Train a model on conversations: an adapter beside it, some of its weights, or all."""

    kind: ClassVar[str] = "adapter"  # methods "full" and "freeze": "model"
    changes: ClassVar[tuple[str, ...]] = ("model",)

    #: the model to tune, and the datasets
    model: Input = ""
    data: Inputs = ()
    #: a weight for each dataset: of so many rows an epoch takes from it, whatever its size (none: each
    #: row once). See `mixing`
    mix: tuple[float, ...] = ()
    #: lora: small matrices beside the frozen ones; ia3: factors of their inputs or outputs; peqa: the
    #: scales of those that the file keeps in 4 or 8 bits; freeze: the last blocks or named parts; full:
    #: all weights
    #: prefix: keys and values of virtual tokens before each row (P-tuning v2); prompt: their embeddings
    method: Literal["lora", "ia3", "peqa", "prefix", "prompt", "freeze", "full"] = "lora"
    #: how the frozen weights beside LoRA are kept. dense: in the format that is computed in;
    #: packaged: in the 4 or 8 bits of the file that they come from (a GGUF, compressed-tensors), which
    #: changes nothing but memory (peqa: always so); nf4: the blocks' matrices rounded to 4 bits (QLoRA)
    base: Literal["dense", "packaged", "nf4"] = "dense"
    #: LoRA's rank, its alpha (the correction counts alpha / rank), dropout on its input
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    #: rslora: the correction counts alpha / √rank, so that a high rank learns as fast as a low one;
    #: dora: LoRA turns a matrix's rows, and their lengths are trained beside it
    rslora: bool = False
    dora: bool = False
    #: so many neighbouring inputs share a column of A. 1: plain LoRA; 32: an adapter that merges
    #: into a Q4_1 base without leaving its 4-bit grid, so that int4 loses nothing that was learnt
    group: int = 1
    #: which matrices get an adapter, of q k v o gate up down (none: all; by ia3 k v down), and in how
    #: many last blocks (0: all), which are also those that freeze trains
    targets: tuple[str, ...] = ()
    last_layers: int = 0
    #: trained whole beside an adapter, of: embed head (as for new tokens)
    whole: tuple[str, ...] = ()
    #: of embed and head (in whole, or in parts), only the rows of tokens from this id on: those that
    #: the vocabulary was extended by (0: all rows). The others stay to the last bit
    rows_from: int = 0
    #: stretch the rotation, and with it the context, by this factor (see model/stretch.py); empty: not
    rope: Literal["", "linear", "ntk", "yarn", "llama3"] = ""
    rope_factor: float = 1.0
    #: how many virtual tokens prefix and prompt train (ChatGLM-6B's own recipe: 128)
    virtual_tokens: int = 20
    #: train a prefix through an MLP of this inner width, of which only its result is kept (0: as it is)
    prefix_projection: int = 0
    #: what freeze trains, by parts of weights' names as "mlp", "bias", "attention.q", "head" (none:
    #: whole blocks)
    parts: tuple[str, ...] = ()
    #: peak rate; its path after the warm-up, down to `floor` · peak; warm-up as share or in steps
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    floor: float = 0.0
    warmup_ratio: float = 0.03
    warmup_steps: int = 0
    #: adamw; adamw8, the same with moments of 8 bits; lion and adafactor, whose rates mean something
    #: else (see their modules; adafactor has no betas)
    optimiser: Literal["adamw", "adamw8", "lion", "adafactor"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    #: the largest norm of a gradient (0: any)
    clip: float = 1.0
    #: decay of the running average that is the result in place of the last step's weights (0: none)
    average: float = 0.0
    #: of all weights in full tuning. float32: throughout; mixed: computed in bfloat16, moved in
    #: float32; bfloat16: no more than that, rounded stochastically (the least memory)
    precision: Literal["float32", "mixed", "bfloat16"] = "float32"
    #: keep of a pack no more than what enters each block, and compute the rest again on the way back:
    #: a third more arithmetic for a fraction of the memory
    recompute: bool = False
    #: passes over the data, or exactly so many optimiser steps (0: by epochs), or as many as take
    #: about so many tokens for each of the model's parameters (0: the others; Chinchilla's optimum: 20)
    epochs: int = 1
    steps: int = 0
    tokens_per_parameter: float = 0.0
    #: conversations per optimiser step
    batch: int = 8
    #: most tokens of a conversation; longer ones are dropped and counted, or refused, never cut
    length: int = 512
    too_long: Literal["drop", "refuse"] = "drop"
    #: tokens computed at once (at least `length`): more is not faster on a CPU, but takes memory
    pack: int = 1024
    #: how hard a row to keep holds the model: the weight of a nat of divergence from the base
    anchor: float = 3.0
    #: of the adapter's start, the order of rows, and dropout
    seed: int = 0
    #: in a mixture of experts, the weight of an even load (Mixtral's own: 0.02); elsewhere unused
    balance: float = 0.02
    #: optimiser steps between two saved states
    save_every: int = 20
    #: kept on disk while it trains, and in memory only where it computes, of: optimiser (its state, see
    #: offload.py), base (the frozen blocks beside an adapter, see model/streamed.py; recomputes). The
    #: same bytes are made
    offload: Annotated[tuple[Literal["optimiser", "base"], ...], HOW] = ()
    #: how the processes that torchrun started share a step: ddp (each has the model), fsdp (each a
    #: share of it), tp:2 (two compute a pack together), pp:2 (each holds half of the blocks), fsdp+tp:2;
    #: see training/parallel.py
    parallel: How = "ddp"

    def __post_init__(self) -> None:
        if self.method in methods.WEIGHTS:
            object.__setattr__(self, "kind", "model")
        if self.dropout:  # is drawn for each pack since revision 2
            object.__setattr__(self, "revision", 2)

    def make(self, bench: Bench) -> dict[str, Any]:
        processes.call(Tune._make, self, replace(bench, progress=Progress(), teacher=None))
        return self._make(bench)

    def _make(self, bench: Bench) -> dict[str, Any]:
        """In every process; the first writes the files."""
        require(self, "model", "data")
        source = bench.artifact("model")
        tokenizer = Tokenizer.load(source.path)
        rows, dropped = gather(self, bench, tokenizer)
        team = parallel.Team(self.parallel)
        if self.offload and not team.alone:
            raise ConfigError(
                f"tune.offload is {','.join(self.offload)} in {team.size} processes",
                rule="but what is kept on disk belongs to one process",
                next="set parallel to fsdp and leave offload out, or run it without torchrun",
            )
        fitting.need_room(self, source.path, rows, bench.work, team)

        with memory.Peak() as peak:
            dtype = torch.float32 if self.kind == "model" else compute_dtype()
            decoder = self._load(source, dtype if self.precision != "bfloat16" else torch.bfloat16)
            held = held_bytes(decoder, streamed=decoder.streamed is not None)
            plan = self._plan(rows, decoder.parameter_count())
            minima = gguf_file(source.path) is not None
            parameters = methods.prepare(decoder, self, minima=minima)
            trainable = sum(p.numel() for p in parameters.values())
            objective: loop.Objective = NextToken(decoder, self.anchor, self.balance)
            objective, parameters = team.share(objective, decoder, self.precision == "mixed")
            state = loop.train(
                objective,
                parameters,
                rows,
                plan,
                bench.work,
                bench.progress,
                team,
                offload="optimiser" in self.offload,
            )
            team.gather(decoder)
        if not team.leads:
            return {}
        records = state.records
        lines = "".join(json.dumps(record) + "\n" for record in records)
        atomic.write_text(bench.out / "losses.jsonl", lines)
        if self.kind == "model":
            merge_lora(decoder)  # rows of new tokens
            save_hf(decoder, tokenizer, bench.out, decoder.dtype)
        else:
            peft_format.save(decoder, bench.out, base=source.id, kept=self.kept)
        return {
            "loss": records[-1]["loss"],
            "first_loss": records[0]["loss"],
            "steps": state.step,
            "rows": len(rows),
            "dropped_rows": dropped,
            "trained_tokens": sum(record["tokens"] for record in records),
            "total_tokens": (seen := self._tokens_seen(rows, plan)),
            "tokens_per_s": round(seen / max(state.seconds, 1e-9), 1),
            "seconds": round(state.seconds, 2),
            "peak_memory_bytes": peak.bytes,
            "weights_bytes": held,
            "trainable_parameters": trainable,
            "processes": team.size,
        }

    def check(self) -> None:
        methods.check(self)
        parallel.check(self)
        if self.mix and (len(self.mix) != len(self.data) or not min(self.mix) > 0):
            raise ConfigError(
                f"tune.mix is {self.mix} for {len(self.data)} datasets",
                rule="but must have a weight above 0 for each",
                next="write a weight for each dataset, as 0.7,0.3, or leave mix out",
            )
        below = {
            "dropout": 1.0,
            "warmup_ratio": 1.0,
            "average": 1.0,
            "floor": math.nextafter(1.0, 2.0),
        }
        free = (
            "weight_decay",
            "clip",
            "anchor",
            "last_layers",
            "rows_from",
            "prefix_projection",
            "alpha",
            "learning_rate",
            "tokens_per_parameter",
            *below,
        )
        given = {name: (getattr(self, name), below.get(name, math.inf)) for name in free}
        given |= {f"betas, {beta:g} of {self.betas},": (beta, 1.0) for beta in self.betas}
        for name, (value, top) in given.items():
            if not 0 <= value < top:  # also catches not-a-number
                raise ConfigError(
                    f"tune.{name} is {value}",
                    rule="but must be at least 0 and finite"
                    + (f", and at most {top:.0f}" if top < math.inf else ""),
                    next=f"correct tune.{name.partition(',')[0]}, or leave it out",
                )
        if self.precision != "float32" and not hasattr(Tensor, "grad_dtype"):
            raise ConfigError(
                f"tune.precision is {self.precision}",
                rule=f"and torch {torch.__version__} keeps no float32 gradient of bfloat16 weights",
                next="pip install -U torch, or leave precision out",
            )
        positive = ("rank", "alpha", "group", "batch", "length", "learning_rate", "save_every")
        for name in (*positive, "virtual_tokens", "epochs" if not self.steps else "steps"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"tune.{name} is {getattr(self, name)}",
                    rule="but must be above 0",
                    next=f"set {name}",
                )

    def _load(self, source: Artifact, dtype: torch.dtype) -> Decoder:
        decoder = load_decoder(
            source.path,
            dtype=dtype,
            quantised=self.kept == "packaged",
            nf4=self.base == "nf4",
            streamed="base" in self.offload,
        )
        decoder.recompute = self.recomputes
        if decoder.config.position == "learned" and self.length > decoder.config.max_pos:
            raise ConfigError(
                f"tune.length is {self.length}",
                rule=f"and {source.ref} has learnt {decoder.config.max_pos} places",
                next=f"set length to {decoder.config.max_pos}",
            )
        few = [m for m in decoder.modules() if isinstance(m, Int4Linear | Int8Linear)]
        if self.base == "packaged" and not few:
            raise ConfigError(
                f"tune.base is packaged, and {source.ref} keeps no matrix in 4 or 8 bits",
                rule="so nothing would be saved",
                next="set base to nf4, or leave it out",
            )
        for layer in few:
            if isinstance(layer, Int4Linear):
                layer.has_kernel = False  # it rounds otherwise than what the adapter learns beside
        return decoder

    @property
    def recomputes(self) -> bool:
        """Whether blocks are computed again on the way back."""
        return self.recompute or "base" in self.offload

    @property
    def kept(self) -> str:
        """How the frozen weights are kept."""
        return "packaged" if self.method == "peqa" else self.base

    def _plan(self, rows: Sequence[Rendering], parameters: int = 0) -> Plan:
        """rows: those of the run, or some like them. parameters: of the model."""
        counts = getattr(rows, "counts", None)  # a planned run's rows are no tables, but have it
        sizes = counts() if self.mix and counts else ()
        steps = self.steps
        if self.tokens_per_parameter:
            mean = float(loop.sizes_of(rows).mean())
            steps = math.ceil(self.tokens_per_parameter * parameters / (self.batch * mean))
        return Plan(
            sizes=sizes,
            mix=mixing.shares(sizes, self.mix) if sizes else (),
            batch=self.batch,
            epochs=self.epochs,
            steps=steps,
            pack=max(self.pack, self.length),
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            floor=self.floor,
            warmup_ratio=self.warmup_ratio,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            betas=self.betas,
            clip=self.clip,
            optimiser=self.optimiser,
            average=self.average,
            precision=self.precision,
            seed=self.seed,
            save_every=self.save_every,
        )

    def _tokens_seen(self, rows: Rows, plan: Plan) -> int:
        sizes = rows.sizes
        return sum(int(sizes[cut].sum()) for cut in loop.batches(plan, len(rows)))
