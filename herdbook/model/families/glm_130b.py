"""GLM-130B: a prefix model with one place a token, GELU-gated MLPs, DeepNorm with α = √(2 · layers).

Zeng et al., 2022 (arXiv:2210.02414); https://github.com/THUDM/GLM-130B. Its checkpoints are SAT's: the
keys here are SAT's arguments (num_layers, inner_hidden_size …) in a config.json of model_type
"glm-130b", or what the tensors say without one; the names are SAT's own. The first half of dense_h_to_4h is multiplied, the second activated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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


def sizes(shapes: Mapping[str, tuple[int, ...]], file: str) -> dict[str, Any] | None:
    """Of GLM-130B's tensors. How wide a head is, its rotary frequencies tell, half as many."""
    layer = chatglm.LAYER.format(n=0)
    embed = shapes.get("transformer.word_embeddings.weight", ())
    down = shapes.get(f"{layer}.mlp.dense_4h_to_h.weight", ())
    up = shapes.get(f"{layer}.mlp.dense_h_to_4h.weight", ())
    turning = shapes.get(f"{layer}.attention.rotary_emb.inv_freq", ())
    if (len(embed), len(down), len(up), len(turning)) != (2, 2, 2, 1):
        return None
    if up[0] != 2 * down[1] or not turning[0] or embed[1] % (2 * turning[0]):
        return None
    numbers = (re.match(r"transformer\.layers\.(\d{1,9})\.", name) for name in shapes)
    return {
        "vocab_size": embed[0],
        "hidden_size": embed[1],
        "num_layers": 1 + max(int(one[1]) for one in numbers if one),
        "num_attention_heads": embed[1] // (2 * turning[0]),
        "inner_hidden_size": down[1],
    }


FAMILY = Family(
    model_type="glm-130b",
    architecture="GLM130B",
    gguf="",
    names=chatglm.NAMES | {"blocks.{n}.mlp.gate": (GATED, "")},
    read=read,
    write=write,
    sizes=sizes,
    folds={
        chatglm.PACKED: Fold(QKV, qkv_by_head),
        GATED: Fold(("blocks.{n}.mlp.up", "blocks.{n}.mlp.gate")),
    },
)
