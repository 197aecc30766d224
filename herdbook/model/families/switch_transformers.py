"""Switch Transformers: T5 with experts in every so manieth layer (`herdbook/model/switch.py`)."""

from __future__ import annotations

from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.families import t5
from herdbook.model.family import Family, Names
from herdbook.model.keys import Keys
from herdbook.model.own_configs import T5Config

MLPS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def sparse(layers: int, of_them: int) -> list[int]:
    """The layers with experts: with one in two 1, 3, 5 …; with as many as layers all."""
    step = layers // of_them if of_them else layers
    return [n for n in range(layers) if step == 1 or (step > 1 and n % step == 1)]


def renamed(config: DecoderConfig) -> Names:
    assert isinstance(config, T5Config)
    return t5.rows(config, "mlp")


def read(keys: Keys) -> DecoderConfig:
    sizes, tied = t5.sizes(keys), keys.flag("tie_word_embeddings", True)
    first = sizes["encoder_layers"]
    decoder = sparse(sizes["layers"] - first, keys.take("num_sparse_decoder_layers", 3))
    # how it is trained, and steps that follow from the numbers of layers
    keys.taken |= {"router_jitter_noise", "router_z_loss_coef", "router_aux_loss_coef"}
    keys.taken |= {"add_router_probs", "router_dtype", "encoder_sparse_step", "decoder_sparse_step"}
    keys.taken |= {"feed_forward_proj", "is_gated_act", "batch_prioritized_routing", "router_type"}
    return T5Config(
        **sizes,
        gated=False,
        activation=keys.choice("dense_act_fn", MLPS, "relu"),
        tied=tied,
        output_scale=tied,
        experts=keys.number("num_experts", 8),
        experts_used=1,
        sparse=(
            *sparse(first, keys.take("num_sparse_encoder_layers", 3)),
            *(first + layer for layer in decoder),
        ),
        capacity=keys.number("expert_capacity", 64),
        router_bias=keys.flag("router_bias"),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    c = config
    assert isinstance(c, T5Config)
    encoder = sum(layer < c.encoder_layers for layer in c.sparse)
    return t5.write_sizes(c) | {
        "dense_act_fn": next(one for one, ours in MLPS.items() if ours == c.activation),
        "num_experts": c.experts,
        "expert_capacity": c.capacity,
        "num_sparse_encoder_layers": encoder,
        "num_sparse_decoder_layers": len(c.sparse) - encoder,
        "router_bias": c.router_bias,
    }


FAMILY = Family(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    gguf="",
    names=t5.NAMES,
    read=read,
    write=write,
    renamed=renamed,
    copies=t5.FAMILY.copies,
)
