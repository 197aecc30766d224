"""Adapters on disk in the layout of the peft library: its users load ours, and we theirs.

    adapter_config.json         {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", …}
    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
                                                                            ….lora_B.weight …

Names are the source's own, from the family's table. Only plain LoRA is read: an adapter that also
brings trained biases, whole modules or another scaling says so in its configuration and is
refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from herdbook.errors import FileError
from herdbook.files import atomic
from herdbook.model.decoder import Decoder
from herdbook.model.families import families
from herdbook.model.lora import TARGETS, LoRALinear, adapters_of, places, put_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
#: settings that would change what the adapter computes, and the only values that are read
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "use_rslora": (None, False),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
}


def save(decoder: Decoder, folder: Path, *, base: str) -> None:
    """Write the adapters that the decoder carries. base: what they were trained on (its id)."""
    adapters = adapters_of(decoder)
    names = _source_names(decoder, adapters)
    layers = sorted({int(name.split(".")[1]) for name in adapters})
    one = next(iter(adapters.values()))
    some = layers if len(layers) < decoder.config.layers else None
    atomic.write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": decoder.peft_task,
            "base_model_name_or_path": base,
            "r": one.rank,
            "lora_alpha": one.alpha,
            "lora_dropout": one.dropout,
            "target_modules": sorted({name.rpartition(".")[2] for name in names.values()}),
            "layers_to_transform": some,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
            "modules_to_save": None,
            "use_rslora": False,
        },
    )
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"{PREFIX}{names[name]}.lora_A.weight"] = adapter.wide_A().detach().contiguous()
        tensors[f"{PREFIX}{names[name]}.lora_B.weight"] = adapter.B.detach().contiguous()
    with atomic.replacing(folder / WEIGHTS) as new:
        save_file(tensors, new, metadata={"format": "pt"})


def load(decoder: Decoder, folder: Path) -> dict[str, LoRALinear]:
    """Put the adapter of a folder onto a decoder, unmerged; name → adapter.

    Everything is checked before the decoder is touched.
    """
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
    pairs = _pairs(decoder, tensors, config, folder)
    adapters: dict[str, LoRALinear] = {}
    for name, (A, B) in pairs.items():
        adapter = put_adapter(decoder, name, config["r"], config["lora_alpha"])
        with torch.no_grad():
            adapter.A.copy_(A)
            adapter.B.copy_(B)
        adapters[name] = adapter
    return adapters


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
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise FileError(
                f"{path}: {key} is {config.get(key)!r}",
                rule="but must be a positive number",
                next="fetch the adapter again",
            )
    return dict(config)


def _pairs(
    decoder: Decoder, tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Our name → (A, B), every tensor used and of the right shape."""
    known = [
        f"blocks.{number}.{place}"
        for number, block in enumerate(decoder.blocks)
        for target in TARGETS
        for place in places(block, target)
    ]
    ours = {source: name for name, source in _source_names(decoder, known).items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None or match[1] not in ours:
            raise FileError(
                f"{folder / WEIGHTS}: {key}",
                rule=f"names no matrix that an adapter can sit on in a {decoder.family} model of "
                f"{decoder.config.layers} layers",
                next="check that the adapter was made for this base model",
            )
        found.setdefault(ours[match[1]], {})[match[2]] = tensor
    if not found:
        raise FileError(f"{folder / WEIGHTS}", rule="holds no tensor", next="train it again")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, parts in found.items():
        linear = decoder.get_submodule(name)
        wanted = {
            "A": (int(config["r"]), linear.inputs),
            "B": (linear.outputs, int(config["r"])),
        }
        for part, shape in wanted.items():
            if part not in parts or tuple(parts[part].shape) != shape:
                got = list(parts[part].shape) if part in parts else "missing"
                raise FileError(
                    f"{folder / WEIGHTS}: lora_{part} of {name} is {got}",
                    rule=f"but rank and base model ask for {list(shape)}",
                    next="check that the adapter was made for this base model",
                )
        pairs[name] = (parts["A"], parts["B"])
    return pairs


def _source_names(decoder: Decoder, names: Mapping[str, Any] | list[str]) -> dict[str, str]:
    """blocks.0.attention.q → model.layers.0.self_attn.q_proj"""
    family = families()[decoder.family]
    found = {name: family.hf_tensor(f"{name}.weight", decoder.config).name for name in names}
    return {name: source.removesuffix(".weight") for name, source in found.items()}
