"""CodeGen, and MOSS that grew from it: GPT-J with q, k and v in one matrix, in four shards.

Nijkamp et al., 2022 (arXiv:2203.13474); MOSS: Sun et al., 2023. Each shard, one of the machine it
was trained on, holds [q | v | k] of a quarter of the heads.
"""

from __future__ import annotations

from herdbook.model.config import DecoderConfig
from herdbook.model.families import gptj
from herdbook.model.family import Family
from herdbook.model.folds import QKV, Fold, qkv_by_shard, qkv_rotating
from herdbook.model.keys import Keys

PACKED = "transformer.h.{n}.attn.qkv_proj"


def read(keys: Keys) -> DecoderConfig:
    keys.only("wbits", 32)  # MOSS: its own quantised checkpoints have 4 or 8
    keys.take("groupsize")
    config = gptj.read(keys)
    if config.heads % 4:
        raise keys.refuse(f"n_head is {config.heads}", "but the heads lie in four shards")
    return config


FAMILY = Family(
    model_type="codegen",
    also=("moss",),
    architecture="CodeGenForCausalLM",
    gguf="",
    names=gptj.NAMES | {name: (PACKED, "") for name in QKV},
    read=read,
    write=gptj.write,
    folds={PACKED: Fold(QKV, qkv_rotating(qkv_by_shard))},
)
