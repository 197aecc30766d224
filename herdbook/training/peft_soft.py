"""Virtual tokens in peft's layout: one tensor, prompt_embeddings.

    PREFIX_TUNING   [n, L · 2 · KV · D]   of each virtual token, layer by layer, its keys and its values
    PROMPT_TUNING   [n, width]            its row of the embedding

L layers, KV key/value heads, D head_dim. Keys are as the source's attention sees them; where our
rotation wants a head's dimensions in another order (a fold), they change places with those of its
matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.model.decoder import Decoder
from herdbook.model.families import families
from herdbook.model.soft import Prefix, ProjectedPrefix, Prompt, Soft, check_soft

TENSOR = "prompt_embeddings"
KINDS: dict[str, type[Soft]] = {"PREFIX_TUNING": Prefix, "PROMPT_TUNING": Prompt}


def write_soft(decoder: Decoder, soft: Soft) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """peft's tensor and settings."""
    c = decoder.config
    if isinstance(soft, ProjectedPrefix):
        soft = soft.projected()
    about: dict[str, Any] = {
        "num_virtual_tokens": soft.tokens,
        "num_transformer_submodules": 1,
        "num_layers": c.layers,
    }
    if isinstance(soft, Prefix):
        keys = torch.empty_like(soft.keys).flatten(2)
        keys[..., _order(decoder)] = soft.keys.detach().flatten(2)
        both = torch.stack([keys, soft.values.detach().flatten(2)], 1)  # [L, 2, n, KV·D]
        flat = both.permute(2, 0, 1, 3).flatten(1)
        about |= {"num_attention_heads": c.kv_heads, "token_dim": c.kv_heads * c.head_dim}
        about |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
    else:
        assert isinstance(soft, Prompt)
        flat = soft.rows.detach()
        about |= {"num_attention_heads": c.heads, "token_dim": flat.shape[1]}
        about |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    return {TENSOR: flat.clone().contiguous()}, about


def read_soft(
    decoder: Decoder, tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path
) -> Soft:
    """The virtual tokens of a folder, checked against the decoder that they are for."""
    kind, c = KINDS[config["peft_type"]], decoder.config
    check_soft(decoder, kind)
    n = config.get("num_virtual_tokens")
    each = 2 * c.layers * c.kv_heads * c.head_dim if kind is Prefix else c.embed_dim or c.hidden
    got = tensors.get(TENSOR)
    if got is None or not isinstance(n, int) or got.shape != (n, each):
        raise FileError(
            f"{file}: {TENSOR} is {'missing' if got is None else list(got.shape)}",
            rule=f"but {n} virtual tokens of this base model ask for {[n, each]}",
            next="check that the adapter was made for this base model",
        )
    got = got.float().to(decoder.device)
    if kind is Prompt:
        return Prompt(got)
    both = got.view(n, c.layers, 2, -1).permute(1, 2, 0, 3)  # [L, 2, n, KV·D]
    keys, values = both.unbind(1)
    shape = (c.layers, n, c.kv_heads, c.head_dim)
    return Prefix(keys[..., _order(decoder)].reshape(shape), values.reshape(shape).contiguous())


def _order(decoder: Decoder) -> Tensor:
    """Which of the source's dimensions of all key heads each of ours is: int64 [KV·D]."""
    name = "blocks.0.attention.k.weight"
    source = families()[decoder.family].hf_tensor(name, decoder.config)
    if source.fold is None:
        return torch.arange(decoder.config.kv_heads * decoder.config.head_dim)
    sizes: list[int] = []
    for one in source.ours:
        layer: Any = decoder.get_submodule(one.removesuffix(".weight"))
        sizes.append(layer.outputs)
    rows = torch.arange(sum(sizes), dtype=torch.float64) - source.fold.plus
    mine: Tensor = source.fold.take(rows, source.ours.index(name), sizes, decoder.config)
    return mine.argsort().argsort()
