"""Where this machine computes, and in which number format."""

from __future__ import annotations

import functools
from typing import Literal

import torch


@functools.cache
def compute_device() -> Literal["cpu", "cuda"]:
    """The GPU that torch sees, else the processor."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def compute_dtype(device: str | None = None) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (CUDA, AVX512-BF16, AMX), else float32.

    A CPU without such instructions emulates bfloat16 some eight times slower than float32.
    """
    if (device or compute_device()) == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has = torch.backends.cpu.get_cpu_capability
    if has().startswith("AVX512") and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return torch.bfloat16
    return torch.float32
