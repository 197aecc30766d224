"""GPT-J 6B and its children (GPT4All-J, Dolly 1): one norm, attention and MLP beside one another.

Wang and Komatsuzaki, 2021. It rotates pairs side by side in the first `rotary_dim` dimensions.
"""

from __future__ import annotations

from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.families import gpt2
from herdbook.model.family import Family
from herdbook.model.folds import K_ROTATING, Q_ROTATING, Fold
from herdbook.model.keys import Keys

NAMES = {
    "embed": ("transformer.wte", ""),
    "blocks.{n}.attention_norm": ("transformer.h.{n}.ln_1", ""),
    "blocks.{n}.attention.q": ("transformer.h.{n}.attn.q_proj", ""),
    "blocks.{n}.attention.k": ("transformer.h.{n}.attn.k_proj", ""),
    "blocks.{n}.attention.v": ("transformer.h.{n}.attn.v_proj", ""),
    "blocks.{n}.attention.o": ("transformer.h.{n}.attn.out_proj", ""),
    "blocks.{n}.mlp.up": ("transformer.h.{n}.mlp.fc_in", ""),
    "blocks.{n}.mlp.down": ("transformer.h.{n}.mlp.fc_out", ""),
    "norm": ("transformer.ln_f", ""),
    "head": ("lm_head", ""),
}


def read(keys: Keys) -> DecoderConfig:
    keys.take("rotary")  # of the first checkpoints; always true
    config = gpt2.read_gpt(
        keys,
        residual="parallel1",
        rope_dim=keys.number("rotary_dim", 64),
        tied=keys.flag("tie_word_embeddings"),
        head_bias=True,
    )
    if config.rope_dim % 2 or config.rope_dim > config.head_dim:
        raise keys.refuse(
            f"rotary_dim is {config.rope_dim}",
            f"but pairs of at most {config.head_dim} dimensions turn",
        )
    return config


def write(config: DecoderConfig) -> dict[str, Any]:
    return gpt2.write(config) | {"rotary_dim": config.rope_dim}


FAMILY = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    gguf="",
    names=NAMES,
    read=read,
    write=write,
    folds={
        "transformer.h.{n}.attn.q_proj": Fold(("blocks.{n}.attention.q",), Q_ROTATING),
        "transformer.h.{n}.attn.k_proj": Fold(("blocks.{n}.attention.k",), K_ROTATING),
    },
)
