"""Configurations of the decoders that are modules of their own: RWKV, T5 and Switch, CPM-Bee."""

from __future__ import annotations

from dataclasses import dataclass

from herdbook.model.config import DecoderConfig


@dataclass(frozen=True)
class RWKVConfig(DecoderConfig):
    """Sizes. There is one head, as wide as the attention: head_dim is A, ffn is F."""


@dataclass(frozen=True, kw_only=True)
class T5Config(DecoderConfig):
    encoder_layers: int  # of `layers`; the rest are the decoder's
    start: int  # the token that the decoder begins with
    end: int  # the token that ends what the encoder reads
    buckets: int = 32  # of distances, each with a bias for each head
    far: int = 128  # the distance from which on all share one
    output_scale: bool = True  # hidden · hidden_size^-½ before the head (v1.0)
    sparse: tuple[int, ...] = ()  # the layers with experts
    capacity: int = 0  # the most tokens of a document that one expert takes
    router_bias: bool = False

    @property
    def expert_layers(self) -> int:
        return len(self.sparse)

    @property
    def plain_head(self) -> bool:
        return super().plain_head and not self.output_scale


#: CPM-Bee: positions of the rotation from one number to the next
NUMBER = 16


@dataclass(frozen=True)
class Marks:
    """Token ids that a row is built of."""

    vocab: int
    first: int  # <s>
    last: int  # </s>
    root: int  # <root>
    answer: int  # <ans>


@dataclass(frozen=True, kw_only=True)
class BeeConfig(DecoderConfig):
    buckets: int  # of distances
    segment_buckets: int  # of relations between segments
    far: int  # the distance from which on all share a bucket
    marks: Marks
    input: tuple[int, ...]  # how the key of a plain prompt is written
    without_attention: tuple[int, ...] = ()  # layers of which pruning left the MLP alone
    without_mlp: tuple[int, ...] = ()

    @property
    def plain_head(self) -> bool:
        return False
