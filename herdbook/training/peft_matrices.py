"""Adapters on matrices between our names and the source's: LoRA, DoRA and IA3 in peft's tensors.

Names are the source's own, from the family's table.

**Packed matrices.** Where the source holds q, k and v in one matrix, peft knows one adapter for it.
Ours, exactly: their A one under another, their B in blocks, in the order of the source's rows; the
rank is their sum, which rank_pattern and alpha_pattern say (r stands for each of them).

    B A = [B_q  0   0 ] [A_q]
          [ 0  B_k  0 ] [A_k]
          [ 0   0  B_v] [A_v]

An adapter that peft trained there gives q, k and v the same A and each its own rows of B. What belongs
to a row (DoRA's length, IA3's factor of an output) goes with it; where we tune but some of the
parts, the others' rows get what changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.model.decoder import Decoder
from herdbook.model.dora import DoRALinear
from herdbook.model.families import families
from herdbook.model.family import SourceTensor
from herdbook.model.folds import Fold
from herdbook.model.ia3 import IA3Linear
from herdbook.model.lora import TARGETS, Adapter, LoRALinear, places

PREFIX = "base_model.model."
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LowRank:
    """scale · B A beside a matrix: A [r, I], B [O, r]; and with DoRA its rows' lengths [O]."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Factors:
    """IA3's, of a matrix's inputs [I] or its outputs [O]."""

    factor: Tensor
    inputs: bool


def sources(decoder: Decoder) -> dict[str, SourceTensor]:
    """Our name of each matrix that an adapter can sit on → the source's module that holds it, by
    names of modules."""
    family, found = families()[decoder.family], {}
    for number, block in enumerate(decoder.blocks):
        for place in (one for target in TARGETS for one in places(block, target)):
            source = family.hf_tensor(f"blocks.{number}.{place}.weight", decoder.config)
            found[f"blocks.{number}.{place}"] = SourceTensor(
                source.name.removesuffix(".weight"),
                tuple(name.removesuffix(".weight") for name in source.ours),
                source.fold,
            )
    return found


# --- writing ---------------------------------------------------------------------------------------


def write_lora(
    decoder: Decoder, adapters: Mapping[str, LoRALinear]
) -> tuple[Tensors, dict[str, Any]]:
    """peft's tensors and settings."""
    tensors: Tensors = {}
    ranks: dict[str, int] = {}  # of packed matrices
    every = sources(decoder)
    taken = _taken(every, adapters)
    for source in taken.values():
        A, B = _packed(decoder, source, adapters)
        tensors[f"{PREFIX}{source.name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{source.name}.lora_B.weight"] = B
        if len(source.ours) > 1:
            ranks[source.name] = len(A)
        if any(isinstance(adapters.get(name), DoRALinear) for name in source.ours):
            lengths = [_lengths(decoder, name) for name in source.ours]
            tensors[f"{PREFIX}{source.name}.lora_magnitude_vector"] = joined(
                decoder, source, lengths
            )
    one = next(iter(adapters.values()))
    layers = _layers(taken)
    some = sorted(layers) if layers < _layers(source.name for source in every.values()) else None
    targets = _targets(every, taken)
    # a packed matrix has its own rank; its scale is to be what it is without
    root = math.sqrt if one.rslora else float
    rank_pattern = {targets[name]: rank for name, rank in ranks.items()}
    return tensors, {
        "peft_type": "LORA",
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout,
        "target_modules": sorted(set(targets.values())),
        "layers_to_transform": some,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {name: root(rank) * one.scale for name, rank in rank_pattern.items()},
        "bias": "none",
        "fan_in_fan_out": _turned(taken),
        "init_lora_weights": True,
        "use_rslora": one.rslora,
        "use_dora": isinstance(one, DoRALinear),
    }


def write_ia3(
    decoder: Decoder, adapters: Mapping[str, IA3Linear]
) -> tuple[Tensors, dict[str, Any]]:
    """peft's tensors and settings. It knows no layers_to_transform here: all modules are named."""
    tensors: Tensors = {}
    of_inputs: list[str] = []
    taken = _taken(sources(decoder), adapters)
    for source in taken.values():
        mine = [adapters.get(name) for name in source.ours]
        first = next(one for one in mine if one is not None)
        if first.of_inputs:
            of_inputs.append(source.name)
            factor = first.factor.detach()[None]
        else:
            parts = [
                first.factor.new_ones(_outputs(decoder, name)) if one is None else one.factor
                for name, one in zip(source.ours, mine, strict=True)
            ]
            factor = joined(decoder, source, parts)[:, None]
        tensors[f"{PREFIX}{source.name}.ia3_l"] = factor.contiguous()
    return tensors, {
        "peft_type": "IA3",
        "target_modules": sorted(taken),
        "feedforward_modules": sorted(of_inputs),
        "fan_in_fan_out": _turned(taken),
        "init_ia3_weights": True,
    }


def _taken(
    every: Mapping[str, SourceTensor], adapters: Mapping[str, Adapter]
) -> dict[str, SourceTensor]:
    """The source's modules that an adapter is on, by their names there."""
    taken = {one.name: one for one in every.values() if set(one.ours) & set(adapters)}
    for source in taken.values():
        if source.fold is not None and source.fold.stacked:
            raise FileError(
                f"{source.name} of this model",
                rule="holds several matrices in an axis of its own, which peft's adapters do not know",
                next="merge the adapter into its base (step Merge), and use the merged model",
            )
    return taken


def _targets(
    every: Mapping[str, SourceTensor], taken: Mapping[str, SourceTensor]
) -> dict[str, str]:
    """Of each module of the source that is tuned, the end of its name by which peft finds it."""
    targets: dict[str, str] = {}
    for name, source in every.items():
        if source.name in taken:
            block = ".".join(name.split(".")[:2])
            beside = {other.name for mine, other in every.items() if mine.startswith(f"{block}.")}
            targets[source.name] = _target(source.name, beside - set(taken))
    return targets


def _target(name: str, others: set[str]) -> str:
    """The end of a module's name by which peft finds it, and none of the `others` in its layer.

    GPT-2 has c_proj in attention and in the MLP: "attn.c_proj" where one of them is tuned alone.
    """
    parts = name.split(".")
    ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    return next(end for end in ends if not any(other.endswith(f".{end}") for other in others))


def _layers(names: Iterable[str]) -> set[int]:
    """The source's numbers of the layers that these modules are in."""
    return {int(next(part for part in name.split(".") if part.isdigit())) for name in names}


def _turned(taken: Mapping[str, SourceTensor]) -> bool:
    return any(source.fold is not None and source.fold.transposed for source in taken.values())


def _packed(
    decoder: Decoder, source: SourceTensor, adapters: Mapping[str, LoRALinear]
) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of the source's matrix, made of the adapters on its parts."""
    mine = [adapters.get(name) for name in source.ours]
    A = torch.cat([one.wide_A().detach() for one in mine if one is not None])
    parts = []
    at = 0
    for name, one in zip(source.ours, mine, strict=True):
        part = A.new_zeros(_outputs(decoder, name), len(A))
        if one is not None:
            part[:, at : at + one.rank] = one.B.detach()
            at += one.rank
        parts.append(part)
    return A.contiguous(), joined(decoder, source, parts)


def joined(decoder: Decoder, source: SourceTensor, parts: list[Tensor]) -> Tensor:
    """What belongs to the rows of our parts, in the order of the source's rows."""
    if source.fold is None:
        return parts[0].detach().contiguous()
    return _by_rows(source.fold).join([p.detach() for p in parts], decoder.config).contiguous()


def _outputs(decoder: Decoder, name: str) -> int:
    layer: Any = decoder.get_submodule(name)
    return int(layer.outputs)


def _lengths(decoder: Decoder, name: str) -> Tensor:
    """The lengths of a matrix's rows: DoRA's, or those that it has."""
    layer: Any = decoder.get_submodule(name)
    lengths = layer.magnitude if isinstance(layer, DoRALinear) else layer.dense(torch.float32)
    return lengths.detach() if lengths.ndim == 1 else lengths.norm(dim=1)


def _by_rows(fold: Fold) -> Fold:
    """The same order for a matrix that is not turned: peft keeps B as [out, r] in any case."""
    return dataclasses.replace(fold, transposed=False, plus=0.0)


# --- reading ---------------------------------------------------------------------------------------


class Reader:
    """Tensors of a folder, checked against the decoder that they are for."""

    def __init__(self, decoder: Decoder, tensors: Mapping[str, Tensor], file: Path) -> None:
        self.decoder, self.tensors, self.file = decoder, tensors, file
        self.sources = {source.name: source for source in sources(decoder).values()}

    def lora(self, config: Mapping[str, Any]) -> dict[str, LowRank]:
        """Our name of each matrix → its adapter; every tensor used and of the right shape."""
        names = r"lora_(A)\.weight|lora_(B)\.weight|lora_(magnitude)_vector"
        found: dict[str, LowRank] = {}
        for name, parts in self.by_module(names).items():
            source, inputs, rows = self.sizes(name)
            rank = int(setting(config, "r", "rank_pattern", name))
            wanted: dict[str, tuple[int, ...]] = {"A": (rank, inputs), "B": (sum(rows), rank)}
            if config.get("use_dora"):
                wanted["magnitude"] = (sum(rows),)
            self._check(name, parts, wanted, f"rank {rank} and base model ask")
            alpha = setting(config, "lora_alpha", "alpha_pattern", name)
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            found |= self._unpacked(source, parts, rows, scale)
        return found

    def ia3(self) -> dict[str, Factors]:
        """Our name of each matrix → its factors. Of inputs they are a row, of outputs a column."""
        found: dict[str, Factors] = {}
        for name, parts in self.by_module(r"ia3_(l)").items():
            source, inputs, rows = self.sizes(name)
            factor = parts["l"]
            if of_inputs := tuple(factor.shape) == (1, inputs):
                found |= {one: Factors(factor[0], inputs=True) for one in source.ours}
            self._check(name, parts, {"l": (1, inputs) if of_inputs else (sum(rows), 1)}, "asked")
            if not of_inputs:
                mine = self.parts(source, factor[:, 0], rows)
                found |= {one: Factors(part, inputs=False) for one, part in mine.items()}
        return found

    def by_module(self, ends: str) -> dict[str, Tensors]:
        """The source's module → its tensors, by the group of `ends` that they match."""
        found: dict[str, Tensors] = {}
        for key, tensor in self.tensors.items():
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(?:{ends})", key)
            if match is None or match[1] not in self.sources:
                raise FileError(
                    f"{self.file}: {key}",
                    rule="names no matrix that an adapter can sit on in a "
                    f"{self.decoder.family} model of {self.decoder.config.layers} layers",
                    next="check that the adapter was made for this base model",
                )
            part = next(one for one in match.groups()[1:] if one)
            found.setdefault(match[1], {})[part] = tensor
        return found

    def sizes(self, name: str) -> tuple[SourceTensor, int, list[int]]:
        """Of the source's matrix: what it is, its inputs, and how many rows each of our parts has."""
        source = self.sources[name]
        linears: list[Any] = [self.decoder.get_submodule(one) for one in source.ours]
        return source, linears[0].inputs, [linear.outputs for linear in linears]

    def _check(
        self, name: str, parts: Tensors, wanted: Mapping[str, tuple[int, ...]], why: str
    ) -> None:
        for part, shape in wanted.items():
            if part not in parts or tuple(parts[part].shape) != shape:
                got = list(parts[part].shape) if part in parts else "missing"
                label = "ia3_l" if part == "l" else f"lora_{part}"
                raise FileError(
                    f"{self.file}: {label} of {name} is {got}",
                    rule=f"but {why} for {list(shape)}",
                    next="check that the adapter was made for this base model",
                )

    def parts(self, source: SourceTensor, rows_of: Tensor, rows: list[int]) -> Tensors:
        """What belongs to the source's rows, by our parts."""
        if source.fold is None:
            return {source.ours[0]: rows_of}
        fold, config = _by_rows(source.fold), self.decoder.config
        return {one: fold.take(rows_of, n, rows, config) for n, one in enumerate(source.ours)}

    def _unpacked(
        self, source: SourceTensor, parts: Tensors, rows: list[int], scale: float
    ) -> dict[str, LowRank]:
        """The adapter of each part. Of a packed matrix, what says nothing about a part is left out."""
        A, B = parts["A"], self.parts(source, parts["B"], rows)
        if "magnitude" in parts:
            lengths = self.parts(source, parts["magnitude"], rows)
            return {one: LowRank(A, part, scale, lengths[one]) for one, part in B.items()}
        if len(B) == 1 or not parts["B"].any():
            return {one: LowRank(A, part, scale) for one, part in B.items()}
        said = {one: part.any(0) for one, part in B.items()}
        return {
            # the scale is of B A, whatever its rank
            one: LowRank(A[said[one]], part[:, said[one]], scale)
            for one, part in B.items()
            if part.any()
        }


def setting(config: Mapping[str, Any], key: str, pattern: str, name: str) -> float:
    """config[key], or what a pattern says for this module."""
    for end, value in (config[pattern] or {}).items():
        if name == end or name.endswith(f".{end}"):
            return float(value)
    return float(config[key])
