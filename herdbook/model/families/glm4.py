"""GLM-4-0414 (`glm4`): GLM-4 with a second norm after attention and after the MLP.

Config: https://huggingface.co/docs/transformers/model_doc/glm4.
"""

from __future__ import annotations

import functools

from herdbook.model.families import glm
from herdbook.model.family import Family

LAYER = "model.layers.{n}"
NAMES = glm.NAMES | {
    "blocks.{n}.after_attention_norm": (
        f"{LAYER}.post_self_attn_layernorm",
        "blk.{n}.post_attention_norm",
    ),
    "blocks.{n}.after_mlp_norm": (f"{LAYER}.post_mlp_layernorm", "blk.{n}.post_ffw_norm"),
}

FAMILY = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    gguf="glm4",
    names=NAMES,
    read=functools.partial(glm.read, norm_place="sandwich"),
    write=glm.write,
    read_gguf=glm.read_gguf,
    folds=glm.FOLDS,
)
