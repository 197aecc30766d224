"""Attention itself: what a layer asks for, and the one place that computes it.

Shapes: B sequences, H query heads, KV key/value heads (H % KV == 0), n queries, S keys, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Look:
    """How a layer looks at its keys.

    window: a token sees itself and the window − 1 tokens before it; None: all before it.
    softcap: scores s become softcap · tanh(s / softcap); 0: they stay (Gemma 2).
    slopes: ALiBi (Press et al., 2021, arXiv:2108.12409): a key that lies d tokens back loses
    slope · d, a slope for each query head; (): none.
    rounded: Falcon's ALiBi: slopes, places and their products are bfloat16, whatever the model's
    format, so that beyond 256 tokens neighbours share a value; and they are scaled as q·k is.
    """

    scale: float
    window: int | None = None
    softcap: float = 0.0
    slopes: tuple[float, ...] = ()
    rounded: bool = False

    def bias(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """ALiBi's part of the scores: queries [..., n], keys [..., S] (places) → [..., H, n, S]."""
        slopes = torch.tensor(self.slopes, device=keys.device)[:, None, None]
        back = keys[..., None, :] - queries[..., :, None]
        if self.rounded:  # by place: a row's softmax does not feel what is added to all of it
            at = keys[..., None, :].expand_as(back).bfloat16()
            return ((slopes.bfloat16() * at[..., None, :, :]).float() * self.scale).to(dtype)
        return (slopes * back[..., None, :, :].float()).to(dtype)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2^(−8i/n) for i = 1…n, n the power of two below; then every other one of those for 2n.

    >>> alibi_slopes(4)
    (0.25, 0.0625, 0.015625, 0.00390625)
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    if power < heads:
        slopes += alibi_slopes(2 * power)[0::2][: heads - power]
    return tuple(slopes)


def attend(
    q: Tensor, k: Tensor, v: Tensor, look: Look, mask: Tensor | None, *, causal: bool = False
) -> Tensor:
    """q [B, H, n, D], k and v [B, KV, S, D] → [B, H, n, D].

    mask: added to the scores (float, with ALiBi's bias already in it) or what is seen (bool);
    causal: query i sees the keys 0 … i, and there is no mask.
    """
    grouped = q.shape[1] != k.shape[1]
    if not look.softcap:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=look.scale, enable_gqa=grouped
        )
    if grouped:
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = (q @ k.transpose(-1, -2)).float() * look.scale
    scores = look.softcap * torch.tanh(scores / look.softcap)
    if causal:
        n = q.shape[2]
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril_()
    if mask is not None:
        hidden = mask if mask.dtype != torch.bool else None
        scores = scores + hidden if hidden is not None else scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v
