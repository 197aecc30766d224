"""Yi-6B and -34B as 01.AI first published them: LLaMA's shape, two names of norms of their own.

Later releases have LLaMA's names and its model_type. The defaults are those of configuration_yi.py.
https://github.com/01-ai/Yi
"""

from __future__ import annotations

from herdbook.model.config import DecoderConfig
from herdbook.model.family import GGUF_ROTATING, LLAMA_NAMES, Family
from herdbook.model.keys import Keys, read_llama, write_llama

NAMES = LLAMA_NAMES | {
    "blocks.{n}.attention_norm": ("model.layers.{n}.ln1", "blk.{n}.attn_norm"),
    "blocks.{n}.mlp_norm": ("model.layers.{n}.ln2", "blk.{n}.ffn_norm"),
}


def read(keys: Keys) -> DecoderConfig:
    return read_llama(keys, rope_base=5_000_000.0, eps=1e-5)


FAMILY = Family(
    model_type="Yi",
    architecture="YiForCausalLM",
    gguf="llama",
    names=NAMES,
    read=read,
    write=write_llama,
    folds=GGUF_ROTATING,
)
