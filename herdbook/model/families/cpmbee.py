"""CPM-Bee (openbmb/cpm-bee-10b, -5b, -2b, -1b): `herdbook/model/cpm_bee.py`.

OpenBMB's own checkpoints have the same names without "cpmbee." and no config.json: their sizes are
those of the tensors. The 5b, 2b and 1b are pruned: some layers lack their attention or their MLP, which
Hugging Face's configuration tells (mask_modules) and otherwise the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.family import Family, Names
from herdbook.model.keys import Keys
from herdbook.model.own_configs import NUMBER, BeeConfig, Marks

#: ids in the vocabulary that all of them share
FIRST, LAST, ROOT, ANSWER, INPUT = 6, 7, 8, 9, 65678

#: positions are relative; so many tokens, prompt and reply, are taken
CONTEXT = 2048

LAYER = "cpmbee.encoder.layers.{n}"
NAMES: Names = {
    "embed": ("cpmbee.input_embedding", ""),
    "bias": ("cpmbee.position_bias.relative_attention_bias=", ""),
    "blocks.{n}.attention_norm": (f"{LAYER}.self_att.layernorm_before_attention", ""),
    "blocks.{n}.attention.q": (f"{LAYER}.self_att.self_attention.project_q", ""),
    "blocks.{n}.attention.k": (f"{LAYER}.self_att.self_attention.project_k", ""),
    "blocks.{n}.attention.v": (f"{LAYER}.self_att.self_attention.project_v", ""),
    "blocks.{n}.attention.o": (f"{LAYER}.self_att.self_attention.attention_out", ""),
    "blocks.{n}.mlp_norm": (f"{LAYER}.ffn.layernorm_before_ffn", ""),
    "blocks.{n}.mlp.gate": (f"{LAYER}.ffn.ffn.w_in.w_0", ""),
    "blocks.{n}.mlp.up": (f"{LAYER}.ffn.ffn.w_in.w_1", ""),
    "blocks.{n}.mlp.down": (f"{LAYER}.ffn.ffn.w_out", ""),
    "norm": ("cpmbee.encoder.output_layernorm", ""),
    "head": ("lm_head", ""),
}


def read(keys: Keys) -> DecoderConfig:
    layers, heads, vocab = (
        keys.number(key) for key in ("num_hidden_layers", "num_attention_heads", "vocab_size")
    )
    masked = keys.take("mask_modules") or [[False, False]] * layers
    if len(masked) != layers or any(len(one) != 2 for one in masked):
        raise keys.refuse(f"mask_modules has {len(masked)} entries", f"must be a pair for {layers}")
    if keys.take("distance_scale", NUMBER) != NUMBER:
        raise keys.refuse(f"distance_scale is {keys.take('distance_scale')}", f"must be {NUMBER}")
    if keys.take("base", 10_000) != 10_000:
        raise keys.refuse(f"base is {keys.take('base')}", "must be 10000")
    buckets = keys.number("position_bias_num_buckets", 256)
    far = keys.number("position_bias_max_distance", 2048)
    if buckets % 4 or far <= buckets // 4:
        raise keys.refuse(f"{buckets} buckets for distances up to {far}", "cannot be told apart")
    keys.taken |= {"half", "init_std", "dropout_p", "is_encoder_decoder"}
    return BeeConfig(
        vocab=vocab,
        hidden=keys.number("hidden_size"),
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=keys.number("dim_head"),
        ffn=keys.number("dim_ff"),
        max_pos=CONTEXT,
        eps=keys.real("eps", 1e-6),
        position="none",
        activation="gelu",
        tied=True,
        buckets=buckets,
        segment_buckets=keys.number("position_bias_num_segment_buckets", 32),
        far=far,
        marks=Marks(vocab, FIRST, LAST, ROOT, ANSWER),
        input=(INPUT,) if vocab > INPUT else (),
        without_attention=tuple(n for n, (attention, _) in enumerate(masked) if attention),
        without_mlp=tuple(n for n, (_, mlp) in enumerate(masked) if mlp),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    c = config
    assert isinstance(c, BeeConfig)
    masked = [[n in c.without_attention, n in c.without_mlp] for n in range(c.layers)]
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "dim_head": c.head_dim,
        "dim_ff": c.ffn,
        "eps": c.eps,
        "position_bias_num_buckets": c.buckets,
        "position_bias_num_segment_buckets": c.segment_buckets,
        "position_bias_max_distance": c.far,
        "mask_modules": masked if c.without_attention or c.without_mlp else None,
    }


def sizes(shapes: Mapping[str, tuple[int, ...]], file: str) -> dict[str, Any] | None:
    """Of OpenBMB's tensors. Half of the buckets are for distances, as in all that were published."""
    embed, bias = "input_embedding.weight", "position_bias.relative_attention_bias"
    if embed not in shapes or bias not in shapes:
        return None
    found: dict[str, dict[int, tuple[int, ...]]] = {"project_q": {}, "w_0": {}}
    for name, shape in shapes.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\..+\.(project_q|w_0)\.weight", name)
        if match:
            found[match[2]][int(match[1])] = shape
    attention, mlp = found["project_q"], found["w_0"]
    if not attention or not mlp:
        return None
    layers = 1 + max(*attention, *mlp)
    heads = shapes[bias][-1]
    return {
        "vocab_size": shapes[embed][0],
        "hidden_size": shapes[embed][-1],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "dim_head": next(iter(attention.values()))[0] // heads,
        "dim_ff": next(iter(mlp.values()))[0],
        "position_bias_num_buckets": shapes[bias][0] // 2,
        "position_bias_num_segment_buckets": shapes[bias][0] // 2,
        "mask_modules": [[n not in attention, n not in mlp] for n in range(layers)],
    }


FAMILY = Family(
    model_type="cpmbee",
    architecture="CpmBeeForCausalLM",
    gguf="",
    names=NAMES,
    read=read,
    write=write,
    sizes=sizes,
)
