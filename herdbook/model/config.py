"""The decoder's configuration: one axis a field, so that families differ by values, never by name.

Only axes that some family here uses are fields. A new family adds the axis it needs (its norm, its
position, its residual), with the LLaMA value as the default, and the code that reads it in
decoder.py; the place is marked there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was first trained on.

    linear: every frequency ÷ factor. llama3: only the slow ones, with a smooth passage between the
    wavelengths original/high and original/low. yarn: slow ones divided, fast ones kept, a ramp
    between by the number of turns within the original context, and q·k scaled by `attention`².
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_pos: int = 0  # llama3, yarn: the context of the first training
    low: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow (turns)
    high: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast (turns)
    attention: float = 1.0  # yarn: cosine and sine are multiplied by this
    truncate: bool = True  # yarn: the ramp's ends are rounded to whole dimensions


@dataclass(frozen=True)
class DecoderConfig:
    # sizes
    vocab: int  # rows of the embedding
    hidden: int
    layers: int
    heads: int
    kv_heads: int  # heads % kv_heads == 0; each serves heads/kv_heads query heads
    head_dim: int  # not always hidden/heads
    ffn: int
    max_pos: int  # the context it was trained for
    # norm
    eps: float = 1e-5
    # position
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    # attention
    windows: tuple[int | None, ...] = ()  # a layer's latest tokens that it sees; () = all, always
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS over each head of q and k, before the rotation
    # MLP
    activation: Activation = "silu"
    mlp_bias: bool = False
    # head
    tied: bool = False  # the head is the embedding

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0 and self.head_dim % 2 == 0
        assert len(self.windows) in (0, self.layers)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None
