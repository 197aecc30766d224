"""Every GGUF type that is read gives llama.cpp's own values: its C functions, called on random blocks.

The rarer types are dequantised by the gguf package, whose Python is not llama.cpp's code either.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from herdbook.errors import FileError
from herdbook.files import gguf

FUNCTIONS = {
    "F16": "ggml_fp16_to_fp32_row",
    "BF16": "ggml_bf16_to_fp32_row",
    **{f"Q{n}": f"dequantize_row_q{n}" for n in ("4_0", "4_1", "5_0", "5_1", "8_0")},
    **{f"Q{n}": f"dequantize_row_q{n}" for n in ("2_K", "3_K", "4_K", "5_K", "6_K")},
    **{f"IQ{n}": f"dequantize_row_iq{n.lower()}" for n in ("1_S", "1_M", "2_XXS", "2_XS", "2_S")},
    **{f"IQ{n}": f"dequantize_row_iq{n.lower()}" for n in ("3_XXS", "3_S", "4_NL", "4_XS")},
    **{n: f"dequantize_row_{n.lower()}" for n in ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4")},
}
BLOCKS = 4096


def of_llama_cpp(raw: np.ndarray, type: str, values: int) -> np.ndarray:
    import xllamacpp.xllamacpp as module

    function = getattr(ctypes.CDLL(module.__file__), FUNCTIONS[type])
    function.restype = None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    out = np.empty(values, np.float32)
    function(raw.ctypes.data, out.ctypes.data, values)
    return out


def scales(type: str, size: int) -> list[int]:
    """Where a block keeps its float16s (the scale, and the minimum)."""
    if type in ("Q4_1", "Q5_1"):
        return [0, 2]
    if type in ("Q2_K", "Q3_K", "Q6_K", "TQ1_0", "TQ2_0"):
        return [size - 4, size - 2] if type == "Q2_K" else [size - 2]
    if type in ("Q4_K", "Q5_K"):
        return [0, 2]
    return [] if type in ("F16", "BF16", "IQ1_M", "MXFP4", "NVFP4") else [0]


def test_none_is_missing() -> None:
    """Whatever the reader accepts is compared here; float32 is as it is."""
    read = set[str]()
    for kind, (_, size) in GGML_QUANT_SIZES.items():
        try:
            gguf.dequantise(np.zeros((1, size), np.uint8), kind.name)
        except FileError:
            continue
        read.add(kind.name)
    assert read == {"F32", *FUNCTIONS}


@pytest.mark.parametrize("type", FUNCTIONS)
def test_the_same_values(type: str) -> None:
    per, size = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    random = np.random.default_rng(0)
    raw = random.integers(0, 256, (BLOCKS, size), np.uint8)
    # every kind of scale: 0, −0, denormal, greatest, and what models have
    extremes = [0.0, -0.0, 6e-8, -6e-8, 6e-5, 65504.0, -65504.0]
    for at in scales(type, size):
        some = np.concatenate([np.repeat(extremes, 100), random.normal(0, 0.01, 1000)])
        some = random.permutation(some).astype(np.float16)
        raw[: len(some), at : at + 2] = some.view(np.uint8).reshape(-1, 2)
    found = gguf.dequantise(raw, type).astype(np.float32).reshape(-1)
    want = of_llama_cpp(raw, type, BLOCKS * per)
    finite = np.isfinite(want)
    assert finite.mean() > 0.7
    np.testing.assert_array_equal(np.isfinite(found), finite)
    # every bit, but that Q4_0 is d·c − 8d here, whose zeros are always positive
    np.testing.assert_array_equal(found[finite], want[finite])
    if type != "Q4_0":
        np.testing.assert_array_equal(np.signbit(found[finite]), np.signbit(want[finite]))
