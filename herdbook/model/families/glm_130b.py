"""GLM-130B: a prefix model with one place a token, GELU-gated MLPs, DeepNorm with α = √(2 · layers).

Zeng et al., 2022 (arXiv:2210.02414); https://github.com/THUDM/GLM-130B. Its checkpoints are SAT's: the
keys here are SAT's arguments (num_layers, inner_hidden_size …) in a config.json of model_type
"glm-130b", the names SAT's own. The first half of dense_h_to_4h is multiplied, the second activated.
"""

from __future__ import annotations

import math
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.families import chatglm
from herdbook.model.family import Family
from herdbook.model.folds import QKV, Fold, qkv_by_head
from herdbook.model.keys import Keys

GATED = f"{chatglm.LAYER}.mlp.dense_h_to_4h"


def read(keys: Keys) -> DecoderConfig:
    alpha = math.sqrt(2 * keys.number("num_layers"))
    return chatglm.read_glm(keys, start=150_004, residual_alpha=alpha, activation="gelu")


def write(config: DecoderConfig) -> dict[str, Any]:
    return chatglm.write_glm(config)


FAMILY = Family(
    model_type="glm-130b",
    architecture="GLM130B",
    gguf="",
    names=chatglm.NAMES | {"blocks.{n}.mlp.gate": (GATED, "")},
    read=read,
    write=write,
    folds={
        chatglm.PACKED: Fold(QKV, qkv_by_head),
        GATED: Fold(("blocks.{n}.mlp.up", "blocks.{n}.mlp.gate")),
    },
)
