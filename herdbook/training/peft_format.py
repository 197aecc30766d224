"""Adapters on disk in the layout of the peft library: its users load ours, and we theirs.

    adapter_config.json         {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", …}
    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
                                                                            ….lora_B.weight …

Names are the source's own, from the family's table. Only plain LoRA is read: an adapter that also
brings trained biases, whole modules or another scaling says so in its configuration and is
refused.

**Packed matrices.** Where the source holds q, k and v in one matrix, peft knows one adapter for it.
Ours, exactly: their A one under another, their B in blocks, in the order of the source's rows; the
rank is their sum, which rank_pattern and alpha_pattern say (r stands for each of them).

    B A = [B_q  0   0 ] [A_q]
          [ 0  B_k  0 ] [A_k]
          [ 0   0  B_v] [A_v]

An adapter that peft trained there gives q, k and v the same A and each its own rows of B.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from herdbook.errors import FileError
from herdbook.files import atomic
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.families import families
from herdbook.model.family import SourceTensor
from herdbook.model.folds import Fold
from herdbook.model.lora import TARGETS, LoRALinear, adapters_of, places, put_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
#: settings that would change what the adapter computes, and the only values that are read
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "use_rslora": (None, False),
    "use_dora": (None, False),
}


def save(decoder: Decoder, folder: Path, *, base: str, kept: str = "dense") -> None:
    """Write the adapters that the decoder carries. base: what they were trained on (its id); kept: in
    which form its weights were (`Tune.base`), which is written down unless they were dense."""
    adapters = adapters_of(decoder)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}  # of packed matrices
    matrices = _matrices(decoder)
    taken = {one.name: one for one in matrices.values() if set(one.ours) & set(adapters)}
    for source in taken.values():
        A, B = _packed(decoder, source, adapters)
        tensors[f"{PREFIX}{source.name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{source.name}.lora_B.weight"] = B
        if len(source.ours) > 1:
            ranks[source.name] = len(A)
    one = next(iter(adapters.values()))
    layers = _layers(taken)
    some = sorted(layers) if layers < _layers(source.name for source in matrices.values()) else None
    targets: dict[str, str] = {}
    for name, source in matrices.items():
        if source.name in taken:
            block = ".".join(name.split(".")[:2])
            beside = {
                other.name for mine, other in matrices.items() if mine.startswith(f"{block}.")
            }
            targets[source.name] = _target(source.name, beside - set(taken))
    computed = str(decoder.dtype).removeprefix("torch.")
    rank_pattern = {targets[name]: rank for name, rank in ranks.items()}
    atomic.write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": decoder.peft_task,
            "base_model_name_or_path": base,
            "r": one.rank,
            "lora_alpha": one.alpha,
            "lora_dropout": one.dropout,
            "target_modules": sorted(set(targets.values())),
            "layers_to_transform": some,
            "rank_pattern": rank_pattern,
            "alpha_pattern": {name: rank * one.scale for name, rank in rank_pattern.items()},
            "bias": "none",
            "fan_in_fan_out": any(
                source.fold and source.fold.transposed for source in taken.values()
            ),
            "init_lora_weights": True,
            "inference_mode": True,
            "modules_to_save": None,
            "use_rslora": False,
        }
        | ({} if kept == "dense" else {"base_kept": kept, "base_computed": computed}),
    )
    with atomic.replacing(folder / WEIGHTS) as new:
        save_file(tensors, new, metadata={"format": "pt"})


def _layers(names: Iterable[str]) -> set[int]:
    """The source's numbers of the layers that these modules are in."""
    return {int(next(part for part in name.split(".") if part.isdigit())) for name in names}


def _target(name: str, others: set[str]) -> str:
    """The end of a module's name by which peft finds it, and none of the `others` in its layer.

    GPT-2 has c_proj in attention and in the MLP: "attn.c_proj" where one of them is tuned alone.
    """
    parts = name.split(".")
    ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    return next(end for end in ends if not any(other.endswith(f".{end}") for other in others))


def _packed(
    decoder: Decoder, source: SourceTensor, adapters: Mapping[str, LoRALinear]
) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] of the source's matrix, made of the adapters on its parts."""
    if source.fold is not None and source.fold.stacked:
        raise FileError(
            f"{source.name} of a {decoder.family} model",
            rule="holds several matrices in an axis of its own, which peft's adapters do not know",
            next="merge the adapter into its base (step Merge), and use the merged model",
        )
    mine = [adapters.get(name) for name in source.ours]
    A = torch.cat([one.wide_A().detach() for one in mine if one is not None])
    parts = []
    at = 0
    for name, one in zip(source.ours, mine, strict=True):
        matrix: Any = decoder.get_submodule(name)
        part = A.new_zeros(matrix.outputs, len(A))
        if one is not None:
            part[:, at : at + one.rank] = one.B.detach()
            at += one.rank
        parts.append(part)
    B = parts[0] if source.fold is None else _by_rows(source.fold).join(parts, decoder.config)
    return A.contiguous(), B.contiguous()


def _by_rows(fold: Fold) -> Fold:
    """The same order for a matrix that is not turned: peft keeps B as [out, r] in any case."""
    return dataclasses.replace(fold, transposed=False, plus=0.0)


def _matrices(decoder: Decoder) -> dict[str, SourceTensor]:
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


def load(decoder: Decoder, folder: Path) -> dict[str, LoRALinear]:
    """Put the adapter of a folder onto a decoder, unmerged; name → adapter.

    Everything is checked before the decoder is touched.
    """
    adapters: dict[str, LoRALinear] = {}
    for name, (A, B, scale) in read(decoder, folder).items():
        adapter = put_adapter(decoder, name, len(A), scale * len(A))
        with torch.no_grad():
            adapter.A.copy_(A)
            adapter.B.copy_(B)
        adapters[name] = adapter
    return adapters


def read(decoder: Decoder, folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """The adapter of a folder, checked against the decoder it is for: our name of each matrix →
    A [r, I], B [O, r] and the scale of B A."""
    config = _config(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise FileError(
            f"{folder / WEIGHTS}", rule="is not there", next="name a folder with a peft adapter"
        ) from error
    except SafetensorError as error:
        raise FileError(
            f"{folder / WEIGHTS}: {error}",
            rule="so it is no whole safetensors file",
            next="fetch or train it again",
        ) from error
    return _pairs(decoder, tensors, config, folder)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(
            f"{path}", rule="is not there", next="name a folder with a peft adapter"
        ) from error
    except ValueError as error:
        raise FileError(f"{path}", rule=f"is no JSON ({error})", next="fetch it again") from error
    for key, allowed in PLAIN.items():
        if key in config and config[key] not in allowed:
            raise FileError(
                f"{path}: {key} is {config[key]!r}",
                rule="which is not plain LoRA",
                next="merge it with the library that made it, and use the merged model",
            )
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.setdefault(key, {}) or {}
        plain = isinstance(pattern, dict) and all(re.fullmatch(r"[\w.]+", one) for one in pattern)
        if not plain or not all(_positive(value) for value in pattern.values()):
            raise FileError(
                f"{path}: {key} is {pattern!r}",
                rule="but must give ends of modules' names a positive number",
                next="merge it with the library that made it, and use the merged model",
            )
    for key in ("r", "lora_alpha"):
        if not _positive(config.get(key)):
            raise FileError(
                f"{path}: {key} is {config.get(key)!r}",
                rule="but must be a positive number",
                next="fetch the adapter again",
            )
    return dict(config)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _setting(config: Mapping[str, Any], key: str, pattern: str, name: str) -> float:
    """config[key], or what a pattern says for this module."""
    for end, value in (config[pattern] or {}).items():
        if name == end or name.endswith(f".{end}"):
            return float(value)
    return float(config[key])


def _pairs(
    decoder: Decoder, tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Our name → (A, B, scale), every tensor used and of the right shape."""
    sources = {source.name: source for source in _matrices(decoder).values()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None or match[1] not in sources:
            raise FileError(
                f"{folder / WEIGHTS}: {key}",
                rule=f"names no matrix that an adapter can sit on in a {decoder.family} model of "
                f"{decoder.config.layers} layers",
                next="check that the adapter was made for this base model",
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise FileError(f"{folder / WEIGHTS}", rule="holds no tensor", next="train it again")
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, parts in found.items():
        source = sources[name]
        linears: list[Any] = [decoder.get_submodule(one) for one in source.ours]
        rows = [linear.outputs for linear in linears]
        rank = int(_setting(config, "r", "rank_pattern", name))
        wanted = {"A": (rank, linears[0].inputs), "B": (sum(rows), rank)}
        for part, shape in wanted.items():
            if part not in parts or tuple(parts[part].shape) != shape:
                got = list(parts[part].shape) if part in parts else "missing"
                raise FileError(
                    f"{folder / WEIGHTS}: lora_{part} of {name} is {got}",
                    rule=f"but rank and base model ask for {list(shape)}",
                    next="check that the adapter was made for this base model",
                )
        scale = _setting(config, "lora_alpha", "alpha_pattern", name) / rank
        for one, (A, B) in _unpacked(source, parts["A"], parts["B"], rows, decoder.config).items():
            pairs[one] = (A, B, scale)
    return pairs


def _unpacked(
    source: SourceTensor, A: Tensor, B: Tensor, rows: list[int], config: DecoderConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each part. Of a packed matrix, what says nothing about a part is left out."""
    if source.fold is None:
        return {source.ours[0]: (A, B)}
    fold = _by_rows(source.fold)
    mine = {one: fold.take(B, n, rows, config) for n, one in enumerate(source.ours)}
    if len(mine) == 1 or not B.any():
        return {one: (A, part) for one, part in mine.items()}
    said = {one: part.any(0) for one, part in mine.items()}
    return {one: (A[said[one]], part[:, said[one]]) for one, part in mine.items() if part.any()}
