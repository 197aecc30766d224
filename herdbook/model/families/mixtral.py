"""Mixtral: Mistral with eight MLPs beside one another in each layer, two of which see a token.

w1 is the gate, w3 up, w2 down. GGUF ("llama") stacks the experts of a layer into one tensor.
Jiang et al., 2024, arXiv:2401.04088; https://huggingface.co/docs/transformers/model_doc/mixtral.
"""

from __future__ import annotations

from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.families.mistral import gguf_note
from herdbook.model.family import GGUF_ROTATING, LLAMA_NAMES, Family
from herdbook.model.folds import Fold
from herdbook.model.keys import Keys, read_llama, write_llama

MOE = "model.layers.{n}.block_sparse_moe"
EXPERT = "blocks.{n}.mlp.experts.{e}"
PARTS = {"gate": "w1", "up": "w3", "down": "w2"}
STACKED = {
    f"{EXPERT}.{ours}": (f"{MOE}.experts.{{e}}.{theirs}", f"blk.{{n}}.ffn_{ours}_exps")
    for ours, theirs in PARTS.items()
}
NAMES = {ours: names for ours, names in LLAMA_NAMES.items() if ".mlp." not in ours}
NAMES |= {"blocks.{n}.mlp.router": (f"{MOE}.gate", "blk.{n}.ffn_gate_inp")} | STACKED


def read(keys: Keys) -> DecoderConfig:
    experts, used = keys.number("num_local_experts", 8), keys.number("num_experts_per_tok", 2)
    if used > experts:
        raise keys.refuse(f"num_experts_per_tok is {used}", f"but there are {experts} experts")
    keys.taken |= {"output_router_logits", "router_aux_loss_coef"}  # of training
    keys.only("router_jitter_noise", 0.0)
    window, layers = keys.take("sliding_window"), keys.number("num_hidden_layers")
    return read_llama(
        keys,
        experts=experts,
        experts_used=used,
        rope_base=1_000_000.0,
        windows=() if window is None else (keys.number("sliding_window"),) * layers,
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    return write_llama(config) | {
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_used,
        "sliding_window": config.window(0),
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    gguf="llama",
    names=NAMES,
    read=read,
    write=write,
    gguf_note=gguf_note,
    folds=GGUF_ROTATING
    | {gguf: Fold((ours,), stacked=True) for ours, (_, gguf) in STACKED.items()},
)
