"""RWKV-4 (Raven, World; ChatRWKV): `herdbook/model/rwkv.py`.

Two layouts of names: Hugging Face's, and BlinkDL's, in which the models were first published, without
a config.json: its sizes are those of the tensors.

`rescale_every` is a device of inference in float16 (hidden states halved every so many layers, the
weights before them too). It changes nothing that is computed but for rounding, and is not done here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family, Names
from herdbook.model.keys import Keys
from herdbook.model.own_configs import RWKVConfig

NAMES: Names = {
    "embed": ("rwkv.embeddings", ""),
    "embed_norm": ("rwkv.blocks.0.pre_ln", ""),
    "blocks.{n}.attention_norm": ("rwkv.blocks.{n}.ln1", ""),
    "blocks.{n}.attention.q": ("rwkv.blocks.{n}.attention.receptance", ""),
    "blocks.{n}.attention.k": ("rwkv.blocks.{n}.attention.key", ""),
    "blocks.{n}.attention.v": ("rwkv.blocks.{n}.attention.value", ""),
    "blocks.{n}.attention.o": ("rwkv.blocks.{n}.attention.output", ""),
    "blocks.{n}.attention.decay": ("rwkv.blocks.{n}.attention.time_decay=", ""),
    "blocks.{n}.attention.first": ("rwkv.blocks.{n}.attention.time_first=", ""),
    "blocks.{n}.attention.mix_q": ("rwkv.blocks.{n}.attention.time_mix_receptance=", ""),
    "blocks.{n}.attention.mix_k": ("rwkv.blocks.{n}.attention.time_mix_key=", ""),
    "blocks.{n}.attention.mix_v": ("rwkv.blocks.{n}.attention.time_mix_value=", ""),
    "blocks.{n}.mlp_norm": ("rwkv.blocks.{n}.ln2", ""),
    "blocks.{n}.mlp.gate": ("rwkv.blocks.{n}.feed_forward.receptance", ""),
    "blocks.{n}.mlp.up": ("rwkv.blocks.{n}.feed_forward.key", ""),
    "blocks.{n}.mlp.down": ("rwkv.blocks.{n}.feed_forward.value", ""),
    "blocks.{n}.mlp.mix_gate": ("rwkv.blocks.{n}.feed_forward.time_mix_receptance=", ""),
    "blocks.{n}.mlp.mix_up": ("rwkv.blocks.{n}.feed_forward.time_mix_key=", ""),
    "norm": ("rwkv.ln_out", ""),
    "head": ("head", ""),
}


def read(keys: Keys) -> DecoderConfig:
    hidden = keys.number("hidden_size")
    keys.taken.add("rescale_every")
    return RWKVConfig(
        vocab=keys.number("vocab_size"),
        hidden=hidden,
        layers=keys.number("num_hidden_layers"),
        heads=1,
        kv_heads=1,
        head_dim=keys.number("attention_hidden_size", hidden),
        ffn=keys.number("intermediate_size", 4 * hidden),
        max_pos=keys.number("context_length", 1024),
        norm="ln",
        eps=keys.real("layer_norm_epsilon", 1e-5),
        position="none",
        embed_norm=True,
        tied=keys.flag("tie_word_embeddings"),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    c = config
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "num_hidden_layers": c.layers,
        "attention_hidden_size": c.head_dim,
        "intermediate_size": c.ffn,
        "context_length": c.max_pos,
        "layer_norm_epsilon": c.eps,
        "tie_word_embeddings": c.tied,
        "rescale_every": 0,
    }


#: Hugging Face's part of a name → BlinkDL's
BLINKDL = {
    "rwkv.": "",
    "embeddings": "emb",
    "pre_ln": "ln0",
    "attention": "att",
    "feed_forward": "ffn",
    "time_mix_key": "time_mix_k",
    "time_mix_value": "time_mix_v",
    "time_mix_receptance": "time_mix_r",
}


def blinkdl(name: str) -> str:
    """rwkv.blocks.3.attention.time_mix_key → blocks.3.att.time_mix_k."""
    for theirs, his in BLINKDL.items():
        name = name.replace(theirs, his)
    return name


def sizes(shapes: Mapping[str, tuple[int, ...]], file: str) -> dict[str, Any] | None:
    """Of RWKV-4's tensors (5 and 6 have a gate besides); the context stands in the file's name,
    RWKV-4-World-7B-v1-20230626-ctx4096, or is what the first were trained on."""
    known = {"emb.weight": 2, "blocks.0.att.time_first": 1, "blocks.0.ffn.key.weight": 2}
    if any(len(shapes.get(name, ())) != axes for name, axes in known.items()):
        return None
    if "blocks.0.att.gate.weight" in shapes:
        return None
    context = re.search(r"ctx(\d{1,9})", file)
    numbers = (re.match(r"blocks\.(\d{1,9})\.", name) for name in shapes)
    return {
        "vocab_size": shapes["emb.weight"][0],
        "hidden_size": shapes["emb.weight"][-1],
        "num_hidden_layers": 1 + max(int(one[1]) for one in numbers if one),
        "attention_hidden_size": shapes["blocks.0.att.time_first"][0],
        "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
        "context_length": int(context[1]) if context else 1024,
    }


FAMILY = Family(
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    gguf="",
    names=NAMES,
    read=read,
    write=write,
    layout=blinkdl,
    sizes=sizes,
)
