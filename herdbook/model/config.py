"""The decoder's configuration: one axis a field, so that families differ by values, never by name.

Only axes that some family here uses are fields. A new family adds the axis it needs, with the LLaMA
value as the default, and the code that reads it in decoder.py. How a checkpoint packs its matrices
is no axis: its description unpacks them.
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
    dynamic: nothing up to max_pos, beyond which nothing here goes; kept for the tools that do.
    """

    kind: Literal["linear", "llama3", "yarn", "dynamic"]
    factor: float
    original_max_pos: int = 0  # llama3, yarn: the context of the first training
    low: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow (turns)
    high: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast (turns)
    attention: float = 1.0  # yarn: cosine and sine are multiplied by this
    truncate: bool = True  # yarn: the ramp's ends are rounded to whole dimensions


@dataclass(frozen=True)
class PrefixMarks:
    """Token ids by which a prefix language model finds its context (herdbook/model/prefix.py)."""

    start: int  # <sop>: the context ends before it
    whole: int  # [gMASK]: the reply goes on from the text
    blank: int  # [MASK]: the reply fills a gap of it


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
    # norm. rms1p: RMS · (1 + w); ln: LayerNorm with a bias
    norm: Literal["rms", "rms1p", "ln"] = "rms"
    eps: float = 1e-5
    #: pre: x + f(norm(x)). sandwich: x + norm(f(norm(x))). post: norm(x + f(x)), and no final norm.
    #: deepnorm: α·norm(x) + f(norm(x))
    norm_place: Literal["pre", "sandwich", "post", "deepnorm"] = "pre"
    # residual. parallel: attention and MLP both read x; with one norm for both, or each with its own
    residual: Literal["sequential", "parallel1", "parallel2"] = "sequential"
    residual_alpha: float = 1.0  # deepnorm's α
    # position
    position: Literal["rope", "rope2d", "alibi", "learned", "none"] = "rope"
    position_offset: int = 0  # learned: the row of the first token
    rope_dim: int = 0  # so many dimensions of a head turn, in the half style; 0: all
    rope_base: float = 10_000.0
    rope_local_base: float = 0.0  # of layers with a window, where they have their own
    rope_scaling: RopeScaling | None = None
    # attention
    windows: tuple[int | None, ...] = ()  # a layer's latest tokens that it sees; () = all, always
    attention_scale: float = 0.0  # of q·k; 0: 1/√head_dim
    attention_softcap: float = 0.0
    alibi_rounded: bool = False  # Falcon: see attention.Look.rounded
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS over each head of q and k, before the rotation
    # MLP
    activation: Activation = "silu"
    gated: bool = True  # down(act(gate(x)) · up(x)); else down(act(up(x)))
    mlp_bias: bool = False
    experts: int = 0  # MLPs beside one another, of which a router chooses; 0: one MLP
    experts_used: int = 2  # for each token, their chances renormalised
    # embedding
    embed_scale: float = 1.0
    embed_norm: bool = False
    embed_dim: int = (
        0  # width of the embedding (and of a tied head), projected to `hidden`; 0: hidden
    )
    # head
    tied: bool = False  # the head is the embedding
    head_bias: bool = False
    head_norm: bool = False  # the head's rows count by their direction alone (Baichuan 2)
    logit_softcap: float = 0.0
    #: a classifier's: what its scores stand for (transformers' id2label)
    labels: tuple[str, ...] = ()
    # the context before the reply sees itself whole (ChatGLM-6B, GLM-130B): marks of where it ends
    prefix: PrefixMarks | None = None

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0 and self.head_dim % 2 == 0
        assert len(self.windows) in (0, self.layers)
        assert not (self.prefix and any(self.windows)), "a context is seen whole"

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @property
    def expert_layers(self) -> int:
        """How many layers have experts."""
        return self.layers if self.experts else 0

    @property
    def plain_head(self) -> bool:
        """Logits are hidden · weightᵀ and nothing more."""
        return not (self.head_bias or self.logit_softcap or self.embed_dim)
