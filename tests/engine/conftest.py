"""A tiny random decoder, and the naive way to continue a prompt: the engine's slow twin."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Packed

VOCAB = 97


def tiny(*, max_pos: int = 256, windows: tuple[int | None, ...] = (), seed: int = 0) -> Decoder:
    config = DecoderConfig(
        vocab=VOCAB,
        hidden=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn=48,
        max_pos=max_pos,
        windows=windows,
        tied=True,
    )
    decoder = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.3, generator=generator)
    return decoder.eval()


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    return tiny()


@torch.inference_mode()
def naive(decoder: Decoder, ids: Sequence[int], tokens: int) -> list[int]:
    """Greedy, everything computed anew for every token."""
    ids = list(ids)
    start = len(ids)
    for _ in range(tokens):
        hidden = decoder(torch.tensor(ids), Packed([len(ids)]))
        ids.append(int(decoder.logits(hidden[-1:])[0].argmax()))
    return ids[start:]


def prompts(count: int, low: int = 1, high: int = 40, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]
