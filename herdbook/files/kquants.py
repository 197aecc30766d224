"""The K-quants of llama.cpp that most files hold, dequantised several times as fast as by the gguf package.

A block has 256 values; d, m float16, codes c, scales s and minima t of 6 bits (Q6_K: s of 8, signed):

    Q4_K  d, m, 12 bytes of s and t, 128 bytes of c         x = d·s·c − m·t    8 runs of 32 share s, t
    Q5_K  d, m, 12 bytes of s and t, 32 of c's bit 4, 128   x = d·s·c − m·t    the same
    Q6_K  128 bytes of c's low half, 64 of its high, 16 s, d   x = d·s·(c − 32)   16 runs of 16

Byte i of the 32 that two runs share holds c[i] of the first in its low half and of the second in its
high. Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from __future__ import annotations

import numpy as np

BLOCK = 256
PAIRS = np.arange(0, 8, 2, dtype=np.uint8)[:, None]


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 that each block keeps at a byte: float32 [n, 1]."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _scaled(blocks: np.ndarray, low: np.ndarray, high: np.ndarray, out: np.ndarray) -> None:
    """out [n, 256] = d·s·c − m·t. low, high: the codes uint8 [n, 4, 32] of the even runs and of the odd."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    first, second, rest = packed[:, 0], packed[:, 1], packed[:, 2]
    scale = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], 1)
    least = np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], 1)
    d, m = (_halves(blocks, 0) * scale)[..., None], (_halves(blocks, 2) * least)[..., None]
    out = out.reshape(-1, 8, 32)
    np.multiply(low, d[:, 0::2], out=out[:, 0::2])
    np.multiply(high, d[:, 1::2], out=out[:, 1::2])
    out -= m


def q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """uint8 [n, 144] → float32 [n, 256]."""
    codes = blocks[:, 16:].reshape(-1, 4, 32)
    _scaled(blocks, codes & 15, codes >> 4, out)


def q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """uint8 [n, 176] → float32 [n, 256]."""
    codes, top = blocks[:, 48:].reshape(-1, 4, 32), blocks[:, None, 16:48]
    low, high = (top >> PAIRS & 1) << 4, (top >> PAIRS + 1 & 1) << 4
    _scaled(blocks, codes & 15 | low, codes >> 4 | high, out)


def q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """uint8 [n, 210] → float32 [n, 256]."""
    codes = np.empty((len(blocks), 2, 4, 32), np.uint8)
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    np.bitwise_and(low, 15, out=codes[:, :, :2])
    np.right_shift(low, 4, out=codes[:, :, 2:])
    codes |= (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> PAIRS & 3) << 4
    signed = codes.view(np.int8)
    signed -= 32
    scale = blocks[:, 192:208].view(np.int8) * _halves(blocks, 208)
    np.multiply(signed.reshape(-1, 16, 16), scale[..., None], out=out.reshape(-1, 16, 16))


DEQUANTISE = {"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
