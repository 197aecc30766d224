"""InternLM 1 (7B and 20B): LLaMA's shape; `bias` puts one on q, k, v and o (7B).

`rotary` is another spelling of the base and of a scaling beyond the trained context. Its GGUF is that
of a llama with biases, and is read as such. Source: internlm's modeling_internlm.py, 2023.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from herdbook.model.config import DecoderConfig, RopeScaling
from herdbook.model.family import GGUF_ROTATING, LLAMA_NAMES, Family
from herdbook.model.keys import Keys, read_llama, write_llama


def read(keys: Keys) -> DecoderConfig:
    bias = keys.flag("bias", True)
    config = read_llama(keys, qkv_bias=bias, out_bias=bias)
    rotary = Keys(keys.take("rotary", {}), f"{keys.where} rotary")
    kind = rotary.choice("type", {"origin": None, "dynamic": "dynamic"}, "origin")
    base = rotary.real("base", config.rope_base)
    scaling = config.rope_scaling
    if kind:
        scaling = RopeScaling("dynamic", rotary.real("scaling_factor", 1.0))
    rotary.finish()
    return dataclasses.replace(config, rope_base=base, rope_scaling=scaling)


def write(config: DecoderConfig) -> dict[str, Any]:
    known, scaling = write_llama(config), config.rope_scaling
    assert scaling is None or scaling.kind == "dynamic", "the family knows no other"
    rotary: dict[str, Any] = {"base": known.pop("rope_theta"), "type": "origin"}
    if scaling:
        rotary |= {"type": "dynamic", "scaling_factor": scaling.factor}
    known.pop("rope_scaling")
    return known | {"bias": config.qkv_bias, "rotary": rotary}


FAMILY = Family(
    model_type="internlm",
    architecture="InternLMForCausalLM",
    gguf="llama",
    names=LLAMA_NAMES,
    read=read,
    write=write,
    folds=GGUF_ROTATING,
)
