"""What autograd keeps of a pass over a pack, counted on the meta device: shapes and no bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from herdbook.model.decoder import Decoder
from herdbook.model.layout import Packed


@dataclass(frozen=True)
class Load:
    """The pack that takes most: how long its documents are, how many of its tokens are trained, and
    whether a step has several packs, so that gradients wait."""

    lengths: tuple[int, ...]
    trained: int
    several: bool

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def activations(decoder: Decoder, load: Load) -> tuple[int, int]:
    """(bytes that autograd keeps of a pass over the pack, of those a block's share)."""
    recompute, decoder.recompute = decoder.recompute, False
    own = {one.untyped_storage()._cdata for one in (*decoder.parameters(), *decoder.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            kept[x.untyped_storage()._cdata] = x
        return x

    c = decoder.config
    layout = Packed(load.lengths, device="meta")
    if c.position == "rope2d":
        layout.positions = layout.positions[:, None].expand(-1, 2)
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            _FlashOnCPU(),
        ):
            x = torch.empty(load.tokens, c.hidden, dtype=decoder.dtype, device="meta")
            x.requires_grad_(_first_needs(decoder))
            soft = decoder.soft
            x = layout.begin(x, soft, shift=c.prefix is None)
            hidden = decoder.finish(decoder.through(x, layout))
    except (NotImplementedError, KeyError, RuntimeError):
        return rough_activations(decoder, load)
    finally:
        decoder.recompute = recompute
    total = sum(one.untyped_storage().nbytes() for one in kept.values()) + hidden.nbytes
    learning = {
        int(name.split(".")[1])
        for name, one in decoder.named_parameters()
        if one.requires_grad and name.startswith("blocks.")
    }
    deep = len(decoder.blocks) - min(learning, default=0)
    return total, total // max(1, deep)


def _first_needs(decoder: Decoder) -> bool:
    """Whether a gradient flows below the first block: then it keeps all of them."""
    return any(
        one.requires_grad for name, one in decoder.named_parameters() if name.startswith("embed")
    )


def eager_bytes(config: Any, itemsize: int) -> int:
    """Bytes that a block keeps of a token when PyTorch runs a LLaMA as written: inputs and outputs of
    both norms, of attention q, k, v and what it gives, four inner widths of the MLP."""
    kv = config.kv_heads * config.head_dim
    q = config.heads * config.head_dim
    inner = config.ffn * (4 if config.gated else 3)
    return int(itemsize * (4 * config.hidden + 2 * q + 2 * kv + inner))


def rough_activations(decoder: Decoder, load: Load) -> tuple[int, int]:
    """The same from above; also where the meta device cannot follow (a router's choices, an encoder)."""
    block = eager_bytes(decoder.config, decoder.dtype.itemsize) * load.tokens * 3 // 2
    return block * len(decoder.blocks), block


class _FlashOnCPU(TorchFunctionMode):
    """Attention on the meta device keeps what the CPU's kernel keeps, not a matrix of all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=args[0].dtype, device=mask.device)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found = flash(
            *args, 0.0, kwargs.get("is_causal", False), attn_mask=mask, scale=kwargs.get("scale")
        )
        return found[0]
