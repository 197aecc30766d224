"""How fast rotary positions turn, and how they are stretched for longer contexts (numbers alone; the
rotation itself is in layers.py and native.cpp).
"""

from __future__ import annotations

import math

import numpy as np

from herdbook.model.config import DecoderConfig, RopeScaling


def rope_frequencies(config: DecoderConfig, base: float = 0.0) -> np.ndarray:
    """Radians a position for each turning pair of dimensions: float32 [rope_dim/2], after scaling.

    base: another one than the configuration's, whose frequencies are never scaled (Gemma 3).
    """
    size = rope_size(config)
    half = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    plain: np.ndarray = 1 / np.float32(base or config.rope_base) ** half
    scaling = config.rope_scaling
    if scaling is None or base:
        return plain
    stretched: np.ndarray = plain / rope_divisors(plain, scaling, config)
    return stretched


def rope_magnitude(config: DecoderConfig, base: float = 0.0) -> float:
    """What cosine and sine are multiplied by."""
    scaling = config.rope_scaling
    return 1.0 if scaling is None or base else scaling.attention


def rope_size(config: DecoderConfig) -> int:
    """How many dimensions of a head a position turns (each of two positions half of them)."""
    size = config.rope_dim or config.head_dim
    return size // 2 if config.position == "rope2d" else size


def rope_divisors(plain: np.ndarray, s: RopeScaling, config: DecoderConfig) -> np.ndarray:
    """What each frequency is divided by, float32: 1 leaves it, `factor` stretches it wholly.

    llama3: https://arxiv.org/abs/2407.21783 (and Meta's llama3 code); yarn: arXiv 2309.00071.
    """
    if s.kind == "dynamic":
        return np.ones_like(plain)
    if s.kind == "linear":
        return np.full_like(plain, s.factor)
    if s.kind == "llama3":
        turns = s.original_max_pos * plain / (2 * math.pi)  # within the original context
        kept = ((turns - s.low) / (s.high - s.low)).clip(0, 1)
    else:
        size = rope_size(config)

        def dimension(turns: float) -> float:
            """The pair (as a real number) that makes so many turns in the original context."""
            radians = s.original_max_pos / (turns * 2 * math.pi)
            return size * math.log(radians) / (2 * math.log(config.rope_base))

        first, last = dimension(s.high), dimension(s.low)
        if s.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        last = last if last != first else last + 0.001
        pair = np.arange(size // 2, dtype=np.float32)
        kept = 1 - ((pair - first) / (last - first)).clip(0, 1)
    return 1 / (kept + (1 - kept) / s.factor)
