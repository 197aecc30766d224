"""A model that has learnt nothing yet: sizes and a tokenizer in, random weights out, for pretraining.

Matrices and embeddings are drawn from a normal distribution of deviation `std`; those that write into
the residual stream (attention's o, the MLP's down) from one smaller by √(2 · layers), so that the
stream's variance does not grow with depth. Norms start at 1, biases at 0.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2), section 2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from herdbook.book.step import Bench, Input, Step, require
from herdbook.errors import ConfigError
from herdbook.model.checkpoint import save_hf
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Init(Step):
    """Make a model of given sizes with random weights, to be pretrained."""

    kind: ClassVar[str] = "model"

    tokenizer: Input = ""
    #: llama: rotary positions, RMS norms, a gated MLP; gpt2: learned positions, LayerNorms, biases
    family: Literal["llama", "gpt2"] = "llama"
    #: sizes; kv_heads 0: as many as heads; ffn 0: as the family has it (llama 8/3 · hidden, rounded up
    #: to a multiple of 32; gpt2 4 · hidden)
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 0
    ffn: int = 0
    #: the longest context
    context: int = 2048
    #: whether the head is the embedding
    tied: bool = False
    std: float = 0.02
    seed: int = 0

    def check(self) -> None:
        require(self, "tokenizer", "hidden", "layers", "heads", "context", "std")
        kv_heads = self.kv_heads or self.heads
        if self.hidden % self.heads or self.hidden // self.heads % 2 or self.heads % kv_heads:
            raise ConfigError(
                f"hidden = {self.hidden}, heads = {self.heads}, kv_heads = {self.kv_heads}",
                rule="but each head needs an even share of hidden, and kv_heads must divide heads",
                next="try hidden 512, heads 8, kv_heads 0",
            )

    def config(self, vocab: int) -> DecoderConfig:
        llama = self.family == "llama"
        axes: dict[str, Any] = {} if llama else {
            "norm": "ln", "position": "learned", "activation": "gelu_tanh", "gated": False,
            "qkv_bias": True, "out_bias": True, "mlp_bias": True,
        }  # fmt: skip
        return DecoderConfig(
            vocab=vocab,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.hidden // self.heads,
            ffn=self.ffn or (-(-self.hidden * 8 // 96) * 32 if llama else 4 * self.hidden),
            max_pos=self.context,
            tied=self.tied,
            **axes,
        )

    def make(self, bench: Bench) -> dict[str, Any]:
        tokenizer = Tokenizer.load(bench.artifact("tokenizer").path)
        decoder = Decoder(self.config(tokenizer.size))
        decoder.family = self.family
        draw(decoder, self.std, torch.Generator().manual_seed(self.seed))
        save_hf(decoder, tokenizer, bench.out, torch.float32)
        return {
            "family": self.family,
            "parameters": decoder.parameter_count(),
            "vocabulary": tokenizer.size,
            "layers": self.layers,
        }


@torch.no_grad()
def draw(decoder: Decoder, std: float, generator: torch.Generator) -> None:
    """Random weights for every matrix and table, in their order; norms 1, biases 0."""
    small = std / math.sqrt(2 * decoder.config.layers)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() < 2:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        else:
            last = name.endswith((".attention.o.weight", ".mlp.down.weight"))
            parameter.normal_(0.0, small if last else std, generator=generator)
