"""Stretch a model's rotation, so that it can be tuned on contexts longer than it was trained for.

    linear   every frequency ÷ factor                          Chen et al., 2023 (arXiv:2306.15595)
    ntk      base · factor^(d / (d − 2)), d turning dimensions: fast frequencies hardly change, the
             slowest is divided by the factor                  "NTK-aware scaling", 2023
    yarn     slow ones ÷ factor, fast ones kept, q·k sharper   Peng et al., 2023 (arXiv:2309.00071)
    llama3   slow ones ÷ factor, with a smooth passage         Llama 3.1, 2024 (arXiv:2407.21783)

The context grows by the factor. What was chosen stands in config.json as transformers reads it, and in
an adapter's folder, so that whoever serves it turns as training did.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from herdbook.errors import ConfigError
from herdbook.model.config import DecoderConfig, RopeScaling
from herdbook.model.decoder import Decoder
from herdbook.model.families import families
from herdbook.model.keys import Keys, read_rope, write_rope_scaling
from herdbook.model.layers import Rotary
from herdbook.model.rope import rope_size

KINDS = ("linear", "ntk", "yarn", "llama3")


def stretched(config: DecoderConfig, kind: str, factor: float) -> DecoderConfig:
    """The configuration for a context of `factor` times the length."""
    if not config.position.startswith("rope") or config.rope_scaling is not None:
        turns = config.position.startswith("rope")
        raise ConfigError(
            f"tune.rope is {kind}",
            rule="but this model's rotation is stretched already"
            if turns
            else "but it turns nothing",
            next="leave rope out",
        )
    original, longer = config.max_pos, int(config.max_pos * factor)
    if kind == "ntk":
        size = rope_size(config)
        base = config.rope_base * factor ** (size / (size - 2))
        return dataclasses.replace(config, rope_base=base, max_pos=longer)
    if kind == "linear":
        scaling = RopeScaling("linear", factor)
    elif kind == "yarn":
        sharper = 0.1 * math.log(factor) + 1
        scaling = RopeScaling("yarn", factor, original, low=1.0, high=32.0, attention=sharper)
    else:
        scaling = RopeScaling("llama3", factor, original, low=1.0, high=4.0)
    return dataclasses.replace(config, rope_scaling=scaling, max_pos=longer)


def stretch(decoder: Decoder, config: DecoderConfig) -> None:
    """Let the decoder turn as this configuration says, which must differ in nothing else."""
    family = families()[decoder.family]
    if family.config(family.source(config), "config.json") != config:
        raise ConfigError(
            f"a stretched rotation in a {decoder.family} model",
            rule="cannot be said in its config.json, so nobody could serve it",
            next="leave rope out",
        )
    decoder.config, decoder.stretched = config, True
    decoder.rotary = Rotary(config)


def said(config: DecoderConfig) -> dict[str, Any]:
    """Of an adapter that was trained so: transformers' own keys."""
    scaling = write_rope_scaling(config) or {"rope_type": "default"}
    return {
        "rope_parameters": {"rope_theta": config.rope_base} | scaling,
        "max_position_embeddings": config.max_pos,
    }


def understood(config: DecoderConfig, about: dict[str, Any], where: str) -> DecoderConfig:
    """The base's configuration with what an adapter's settings say; FamilyError where it cannot be."""
    if "rope_parameters" not in about:
        return config
    keys = Keys(about, where)
    max_pos = keys.number("max_position_embeddings")
    base, scaling = read_rope(keys, max_pos, partial=True)
    return dataclasses.replace(config, rope_base=base, rope_scaling=scaling, max_pos=max_pos)
