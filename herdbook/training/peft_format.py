"""Adapters on disk in the layout of the peft library: its users load ours, and we theirs.

    adapter_config.json         {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", …}
    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
                                                                            ….lora_B.weight …

LoRA (with rsLoRA's scale, DoRA's lengths) and IA3 on the matrices of blocks (peft_matrices.py), and
beside them the embedding and the head trained whole (`modules_to_save`); or virtual tokens before
every document (peft_soft.py). What brings more than these, as trained biases, says so in its configuration and is refused.

A head that is tied to the embedding is written as both, so that peft, which unties what it trains
whole, computes the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from herdbook.errors import FileError
from herdbook.files import atomic
from herdbook.model.decoder import Decoder
from herdbook.model.dora import DoRALinear
from herdbook.model.families import families
from herdbook.model.ia3 import IA3Linear, put_factors
from herdbook.model.lora import Adapter, LoRALinear, adapters_of, put_adapter
from herdbook.model.references import ADAPTER
from herdbook.model.soft import Soft
from herdbook.model.whole import Whole, train_whole
from herdbook.training.peft_matrices import (
    PREFIX,
    Factors,
    LowRank,
    Reader,
    write_ia3,
    write_lora,
)
from herdbook.training.peft_soft import KINDS as SOFT
from herdbook.training.peft_soft import read_soft, write_soft

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
#: settings that would change what the adapter computes, and the only values that are read
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", "IA3", *SOFT),
    "bias": ("none",),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
    "layer_replication": (None,),
}
#: what a layer that is trained whole consists of, here and there
WHOLE = {"matrix": "weight", "vector": "bias"}
#: modules that transformers 5 calls otherwise than the tensors of a folder (GPT-NeoX)
RENAMED = {"embed_out.weight": "lm_head.weight"}


@dataclass(frozen=True)
class Found:
    """What a folder holds for a decoder: by our names adapters and layers trained whole; or virtual
    tokens."""

    layers: Mapping[str, LowRank | Factors] = field(default_factory=dict)
    whole: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    soft: Soft | None = None


def save(decoder: Decoder, folder: Path, *, base: str, kept: str = "dense") -> None:
    """Write the adapters that the decoder carries. base: what they were trained on (its id); kept: in
    which form its weights were (`Tune.base`), which is written down unless they were dense."""
    adapters = adapters_of(decoder)
    lora = {name: one for name, one in adapters.items() if isinstance(one, LoRALinear)}
    ia3 = {name: one for name, one in adapters.items() if isinstance(one, IA3Linear)}
    if decoder.soft is not None:
        tensors, about = write_soft(decoder, decoder.soft)
    else:
        tensors, about = write_lora(decoder, lora) if lora else write_ia3(decoder, ia3)
    whole: list[str] = []
    for name, one in adapters.items():
        if isinstance(one, Whole):
            for module in _modules(decoder, name):
                whole.append(module.rpartition(".")[2])
                for mine, leaf in WHOLE.items():
                    if (tensor := getattr(one, mine)) is not None:
                        tensors[f"{PREFIX}{module}.{leaf}"] = tensor.detach().clone()
    if whole:
        about["modules_to_save"] = sorted(whole)
    about |= {
        "task_type": decoder.peft_task,
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if kept != "dense":
        computed = str(decoder.dtype).removeprefix("torch.")
        about |= {"base_kept": kept, "base_computed": computed}
    atomic.write_json(folder / CONFIG, about)
    with atomic.replacing(folder / WEIGHTS) as new:
        save_file(tensors, new, metadata={"format": "pt"})


def _modules(decoder: Decoder, name: str) -> list[str]:
    """The source's modules that hold our embedding or head; a tied one is both."""
    names = ("embed", "head") if name == "embed" and decoder.head is None else (name,)
    family = families()[decoder.family]
    found = (family.hf_tensor(f"{one}.weight", decoder.config).name for one in names)
    return [RENAMED.get(one, one).removesuffix(".weight") for one in found]


def load(decoder: Decoder, folder: Path) -> dict[str, Adapter]:
    """Put the adapter of a folder onto a decoder, unmerged; name → adapter.

    Everything is checked before the decoder is touched.
    """
    found = read(decoder, folder)
    adapters: dict[str, Adapter] = {}
    if found.soft is not None:
        decoder.soft = adapters["soft"] = found.soft
    with torch.no_grad():
        for name, one in found.layers.items():
            adapters[name] = _put(decoder, name, one)
        for name, tensors in found.whole.items():
            layer = adapters[name] = train_whole(decoder, name)
            for mine, tensor in tensors.items():
                getattr(layer, mine).copy_(tensor)
    return adapters


def _put(decoder: Decoder, name: str, found: LowRank | Factors) -> Adapter:
    if isinstance(found, Factors):
        factors = put_factors(decoder, name, found.inputs)
        factors.factor.copy_(found.factor)
        return factors
    rank = len(found.A)
    kind = LoRALinear if found.magnitude is None else DoRALinear
    adapter = put_adapter(decoder, name, rank, found.scale * rank, kind=kind)
    adapter.A.copy_(found.A)
    adapter.B.copy_(found.B)
    if isinstance(adapter, DoRALinear) and found.magnitude is not None:
        adapter.magnitude.copy_(found.magnitude)
    return adapter


def read(decoder: Decoder, folder: Path) -> Found:
    """The adapter of a folder, checked against the decoder that it is for."""
    config = _config(folder / CONFIG)
    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except FileNotFoundError as error:
        raise FileError(
            f"{file}", rule="is not there", next="name a folder with a peft adapter"
        ) from error
    except SafetensorError as error:
        raise FileError(
            f"{file}: {error}",
            rule="so it is no whole safetensors file",
            next="fetch or train it again",
        ) from error
    if not tensors:
        raise FileError(f"{file}", rule="holds no tensor", next="train it again")
    if config["peft_type"] in SOFT:
        return Found(soft=read_soft(decoder, tensors, config, file))
    whole = _whole(decoder, tensors, config, file)
    reader = Reader(decoder, tensors, file)
    if config["peft_type"] == "IA3":
        return Found(reader.ia3(), whole)
    return Found(reader.lora(config), whole)


def _whole(
    decoder: Decoder, tensors: dict[str, Tensor], config: Mapping[str, Any], file: Path
) -> dict[str, dict[str, Tensor]]:
    """Take what was trained whole out of the tensors: embed or head → its matrix (and vector)."""
    found: dict[str, dict[str, Tensor]] = {}
    tied = decoder.head is None
    for name in ("embed",) if tied else ("embed", "head"):
        layer: Any = decoder.get_submodule(name)
        shapes = {"matrix": layer.dense(torch.float32).shape}
        if getattr(layer, "bias", None) is not None:
            shapes["vector"] = layer.bias.shape
        modules = _modules(decoder, name)
        for mine, shape in shapes.items() if config.get("modules_to_save") else ():
            keys = [f"{PREFIX}{module}.{WHOLE[mine]}" for module in modules]
            got = [tensors.pop(key) for key in keys if key in tensors]
            if not got:
                continue
            if len(got) < len(keys) or any(not torch.equal(got[0], one) for one in got[1:]):
                raise FileError(
                    f"{file}: {keys[0]}",
                    rule=f"is not what {keys[-1]} is, and this base has one matrix for both",
                    next="merge it with the library that made it, and use the merged model",
                )
            if got[0].shape != shape:
                raise FileError(
                    f"{file}: {keys[0]} is {list(got[0].shape)}",
                    rule=f"but the base's is {list(shape)}",
                    next="use the base with the vocabulary that it was trained for",
                )
            found.setdefault(name, {})[mine] = got[0]
    return found


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
                rule=f"and only {' or '.join(map(str, allowed))} can be read here",
                next="merge it with the library that made it, and use the merged model",
            )
    if config.get("peft_type") == "IA3" or config.get("peft_type") in SOFT:
        return dict(config)
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
