"""Adapters on disk in the layout of the peft library: its users load ours, and we theirs.

    adapter_config.json         {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", …}
    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
                                                                            ….lora_B.weight …

LoRA (with rsLoRA's scale, DoRA's lengths) and IA3 on the matrices of blocks (peft_matrices.py), and
beside them the embedding and the head trained whole (`modules_to_save`) or some of their rows
(`trainable_token_indices`, peft_whole.py); or virtual tokens before every document (peft_soft.py);
PEQA's scales lie in the same manner (peft_scales.py). What brings more than these, as trained biases, says so in its configuration and is refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from herdbook.errors import FileError
from herdbook.files import atomic
from herdbook.model import stretch
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.dora import DoRALinear
from herdbook.model.ia3 import IA3Linear, put_factors
from herdbook.model.lora import Adapter, LoRALinear, adapters_of, put_adapter, replace
from herdbook.model.peqa import PEQALinear, RescaledLinear
from herdbook.model.references import ADAPTER
from herdbook.model.soft import Soft
from herdbook.training.peft_matrices import (
    Factors,
    LowRank,
    Reader,
    Tensors,
    write_ia3,
    write_lora,
)
from herdbook.training.peft_scales import Scales, read_scales, write_scales
from herdbook.training.peft_soft import KINDS as SOFT
from herdbook.training.peft_soft import read_soft, write_soft
from herdbook.training.peft_whole import Table, read_whole, write_whole

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
#: settings that would change what the adapter computes, and the only values that are read
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", "IA3", "PEQA", *SOFT),
    "bias": ("none",),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
    "layer_replication": (None,),
}


@dataclass(frozen=True)
class Found:
    """What a folder holds for a decoder: by our names adapters and layers trained whole; or virtual
    tokens."""

    layers: Mapping[str, LowRank | Factors | Scales] = field(default_factory=dict)
    whole: Mapping[str, Table] = field(default_factory=dict)
    soft: Soft | None = None
    #: of the decoder, where the adapter was trained with a stretched rotation
    config: DecoderConfig | None = None


def save(decoder: Decoder, folder: Path, *, base: str, kept: str = "dense") -> None:
    """Write the adapters that the decoder carries. base: what they were trained on (its id); kept: in
    which form its weights were (`Tune.base`), which is written down unless they were dense."""
    adapters = adapters_of(decoder)
    lora = {name: one for name, one in adapters.items() if isinstance(one, LoRALinear)}
    ia3 = {name: one for name, one in adapters.items() if isinstance(one, IA3Linear)}
    scales = {name: one for name, one in adapters.items() if isinstance(one, PEQALinear)}
    if decoder.soft is not None:
        tensors, about = write_soft(decoder, decoder.soft)
    elif scales:
        tensors, about = write_scales(decoder, scales)
    else:
        tensors, about = write_lora(decoder, lora) if lora else write_ia3(decoder, ia3)
    tables, said = write_whole(decoder, adapters)
    tensors |= tables
    about |= said | {
        "task_type": decoder.peft_task,
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if decoder.stretched:
        about |= stretch.said(decoder.config)
    if kept != "dense":
        computed = str(decoder.dtype).removeprefix("torch.")
        about |= {"base_kept": kept, "base_computed": computed}
    atomic.write_json(folder / CONFIG, about)
    with atomic.replacing(folder / WEIGHTS) as new:
        save_file(tensors, new, metadata={"format": "pt"})


def load(decoder: Decoder, folder: Path) -> dict[str, Adapter]:
    """Put the adapter of a folder onto a decoder, unmerged; name → adapter.

    Everything is checked before the decoder is touched.
    """
    found = read(decoder, folder)
    adapters: dict[str, Adapter] = {}
    if found.config is not None and found.config != decoder.config:
        stretch.stretch(decoder, found.config)
    if found.soft is not None:
        decoder.soft = adapters["soft"] = found.soft
    with torch.no_grad():
        for name, one in found.layers.items():
            adapters[name] = _put(decoder, name, one)
        for name, table in found.whole.items():
            adapters[name] = table.put(decoder, name)
    return adapters


def method(folder: Path) -> str:
    """peft's name of the method that this adapter is of."""
    return str(_config(folder / CONFIG)["peft_type"])


def kept(folder: Path) -> str:
    """In which form the weights were that this adapter was trained beside (`Tune.base`)."""
    return str(_config(folder / CONFIG).get("base_kept", "dense"))


def _put(decoder: Decoder, name: str, found: LowRank | Factors | Scales) -> Adapter:
    if isinstance(found, Scales):
        base: Any = decoder.get_submodule(name)
        layer = RescaledLinear(base, found.on(base))
        replace(decoder, name, layer)
        return layer
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
    longer = stretch.understood(decoder.config, config, str(folder / CONFIG))
    found = _found(decoder, tensors, config, file)
    return dataclasses.replace(found, config=longer)


def _found(decoder: Decoder, tensors: Tensors, config: dict[str, Any], file: Path) -> Found:
    if config["peft_type"] in SOFT:
        return Found(soft=read_soft(decoder, tensors, config, file))
    whole = read_whole(decoder, tensors, config, file)
    reader = Reader(decoder, tensors, file)
    if config["peft_type"] == "IA3":
        return Found(reader.ia3(), whole)
    if config["peft_type"] == "PEQA":
        return Found(read_scales(reader))
    return Found(reader.lora(config), whole)


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
    if config.get("peft_type") in ("IA3", "PEQA", *SOFT):
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
