"""GGUF files: what we write we read; what is broken is refused, never followed."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf as peer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from herdbook.errors import FileError
from herdbook.files import gguf, kquants

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["<s>", "Ġthe", "牛", ""],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.scores": [0.0, -1.5, -2.0, -3.0],
    "general.languages": [],
}


def matrix(rows: int = 4, columns: int = 64) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)


def small(path: Path) -> Path:
    tensors = [("a.weight", "Q4_1", matrix()), ("b.weight", "F32", matrix(1, 5)[0])]
    gguf.write(path, METADATA, tensors)
    return path


@pytest.mark.parametrize("type", gguf.WRITABLE)
def test_written_files_read_back_here_and_in_the_gguf_package(type: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    values = matrix()
    gguf.write(path, METADATA, [("a", type, values), ("b", "F32", values[0])])
    file = gguf.read(path)
    assert file.metadata == METADATA
    assert file.tensors["a"].shape == (4, 64) and file.tensors["b"].shape == (64,)
    np.testing.assert_array_equal(file.array("b"), values[0])
    step = {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q4_0": 0.3, "Q4_1": 0.25}[type]
    assert np.abs(file.array("a") - values).max() <= step

    theirs = peer.GGUFReader(path)
    assert {k: theirs.fields[k].contents() for k in METADATA if METADATA[k]} == {
        k: v for k, v in METADATA.items() if v
    }
    (a, _) = theirs.tensors
    np.testing.assert_array_equal(
        peer.dequantize(a.data, a.tensor_type).reshape(4, 64), file.array("a").astype(np.float32)
    )


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q8_0"])
def test_dequantise_is_that_of_the_gguf_package(type: str) -> None:
    raw = peer.quantize(matrix(8, 96), peer.GGMLQuantizationType[type])
    want = peer.dequantize(raw, peer.GGMLQuantizationType[type])
    np.testing.assert_array_equal(gguf.dequantise(raw, type), want)


@pytest.mark.parametrize("type", kquants.DEQUANTISE)
def test_k_quants_are_those_of_the_gguf_package(type: str) -> None:
    kind = peer.GGMLQuantizationType[type]
    values, size = peer.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 120, (7, 3 * size), np.uint8)  # finite scales
    found = gguf.dequantise(raw, type)
    assert found.shape == (7, 3 * values)
    np.testing.assert_array_equal(found, peer.dequantize(raw, kind))


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q8_0", *kquants.DEQUANTISE])
def test_scales_that_are_not_finite_give_values_that_are_not(type: str) -> None:
    """Without a warning of numpy's: the file is at fault, not the arithmetic."""
    kind = peer.GGMLQuantizationType[type]
    values, size = peer.GGML_QUANT_SIZES[kind]
    raw = np.full((1, size), 0xFF, np.uint8)  # every float16 in it is NaN
    raw[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    found = gguf.dequantise(raw, type)
    assert found.shape == (1, values) and not np.isfinite(found).any()


def test_q4_1_is_no_worse_than_the_gguf_packages() -> None:
    values = matrix(64, 256)
    kind = peer.GGMLQuantizationType.Q4_1
    theirs = peer.dequantize(peer.quantize(values, kind), kind) - values
    ours = gguf.dequantise(gguf.quantise(values, "Q4_1"), "Q4_1") - values
    assert (ours**2).mean() <= (theirs**2).mean()


BLOCKS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.just(64)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)


@given(BLOCKS)
@settings(max_examples=100, deadline=None)
def test_q4_1_errs_by_half_a_step(values: np.ndarray) -> None:
    found = gguf.dequantise(gguf.quantise(values, "Q4_1"), "Q4_1")
    blocks = values.reshape(-1, 32)
    spread = blocks.max(1) - blocks.min(1)
    # half a step, and what float16 loses of the scale (15 times) and the minimum
    room = spread / 30 + spread * 2e-3 + np.abs(blocks).max(1) * 1e-3 + 1e-6
    assert (np.abs(found - values).reshape(-1, 32).max(1) <= room).all()


@given(
    scale=st.floats(2**-14, 8, width=16),
    steps_to_minimum=st.floats(-1000, 1000),
    codes=st.lists(st.integers(0, 15), min_size=30, max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_a_matrix_on_the_q4_1_grid_comes_back_bit_by_bit(
    scale: float, steps_to_minimum: float, codes: list[int]
) -> None:
    """A block of a quantiser that takes the least and greatest value has codes 0 and 15 in use."""
    d = np.float16(scale)
    m = np.float16(d * np.float32(steps_to_minimum))
    block = np.array([*codes, 0, 15], np.float32) * np.float32(d) + np.float32(m)
    raw = gguf.quantise(block[None], "Q4_1")
    assert raw[0, :4].tobytes() == np.array([d, m + np.float16(0)]).tobytes()
    np.testing.assert_array_equal(gguf.dequantise(raw, "Q4_1")[0], block)


def test_values_that_are_not_finite_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    values = matrix()
    values[1, 1] = np.nan
    with pytest.raises(FileError, match="'a' holds values that are not finite"):
        gguf.write(tmp_path / "m.gguf", METADATA, [("a", "Q4_1", values)])
    assert list(tmp_path.iterdir()) == []


# --- broken files ---


def test_wrong_magic(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"<!DOCTYPE html>" * 9)
    with pytest.raises(FileError, match=r"starts with b'<!DO' but a GGUF file starts with b'GGUF'"):
        gguf.read(path)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is no file"):
        gguf.read(tmp_path / "no.gguf")
    (tmp_path / "e.gguf").touch()
    with pytest.raises(FileError, match="is empty"):
        gguf.read(tmp_path / "e.gguf")


def test_unknown_version(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(FileError, match="GGUF version 9 is not one of"):
        gguf.read(path)


@pytest.mark.parametrize(("tensors", "keys"), [(2**60, 0), (0, 2**60), (10**9, 10**9)])
def test_absurd_counts_end_at_once(tensors: int, keys: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + bytes(100))
    with pytest.raises(FileError, match="the header wants"):
        gguf.read(path)


def test_a_tensor_past_the_end(tmp_path: Path) -> None:
    whole = small(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:-24])
    with pytest.raises(FileError, match=r"tensor 'b.weight' should lie at bytes .* of a file of"):
        gguf.read(tmp_path / "m.gguf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "m.gguf")
    whole = path.read_bytes()
    path.unlink()
    data_end = len(whole) - (-20 % 32)  # 5 floats, then padding
    for length in range(1, data_end, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError):
            gguf.read(path)
        path.unlink()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_damage_ends_in_anything_but_a_file_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = small(tmp_path_factory.mktemp("g") / "m.gguf")
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        file = gguf.read(path)
    except FileError:
        return
    for name, tensor in file.tensors.items():
        assert file.raw(name).nbytes == tensor.nbytes


# --- absurd ones ---


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, keys: int, *parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)


def tensor(name: str, shape: list[int], type: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type, offset)


F32_4 = tensor("a", [4])
ABSURD = {
    "a string past the end": (header(0, 1, struct.pack("<Q", 2**63)), "the header wants"),
    "a string of 2⁶⁴−1": (header(0, 1, struct.pack("<Q", 2**64 - 1)), "the header wants"),
    "a long array": (header(0, 1, text("k"), struct.pack("<IIQ", 9, 0, 2**62)), "arrays should"),
    "an array of absurd length": (
        header(0, 1, text("k"), struct.pack("<IIQ", 9, 8, 2**64 - 1)),
        "its arrays should have 18,446,744,073,709,551,615 values",
    ),
    "a nested array": (
        header(0, 1, text("k"), struct.pack("<IIQ", 9, 9, 1), struct.pack("<IQ", 9, 1)),
        "an array of the type 9",
    ),
    "an unknown value": (header(0, 1, text("k"), struct.pack("<I", 99)), "unknown type 99"),
    "a key twice": (header(0, 2, *[text("k") + struct.pack("<IB", 7, 1)] * 2), "'k' comes twice"),
    "a tensor twice": (header(2, 0, F32_4, tensor("a", [4], 0, 32)), "'a' comes twice"),
    "tensors that overlap": (header(2, 0, F32_4, tensor("b", [4], 0, 0)), "'b' lies at byte"),
    "past 64 bits": (header(1, 0, tensor("a", [2**63, 2**63, 2**63])), "should lie at bytes"),
    "no values": (header(1, 0, tensor("a", [4, 0])), r"has the shape \(0, 4\)"),
    "half a block": (header(1, 0, tensor("a", [48], 2)), "Q4_0 has blocks of 32"),
    "no axes": (header(1, 0, tensor("a", [])), "has 0 dimensions"),
    "many axes": (header(1, 0, tensor("a", [1] * 9)), "has 9 dimensions"),
    "an unknown type": (header(1, 0, tensor("a", [4], 999)), "of the unknown type number 999"),
    "a crooked offset": (header(1, 0, tensor("a", [4], 0, 7)), "should lie at bytes"),
    "an offset past the end": (header(1, 0, tensor("a", [4], 0, 2**63)), "should lie at bytes"),
    "an odd alignment": (
        header(0, 1, text("general.alignment"), struct.pack("<II", 4, 7)),
        "general.alignment is 7",
    ),
    "no UTF-8": (header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"), "is not UTF-8"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_files_are_refused(case: str, tmp_path: Path) -> None:
    raw, reason = ABSURD[case]
    (tmp_path / "m.gguf").write_bytes(raw + bytes(200))
    with pytest.raises(FileError, match=reason):
        gguf.read(tmp_path / "m.gguf")


def large(path: Path, raw: bytes, size: int) -> Path:
    """A file of `size` bytes that takes no room on the disk: the rest is a hole of zeros."""
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(size)
    return path


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (header(0, 10**9), "a header at most 256,000,000"),
        (header(10**9, 0), "a header at most 256,000,000"),
        (header(0, 10**7), "no model has so many"),
        (header(10**7, 0), "no model has so many"),
        (header(0, 1, text("k"), struct.pack("<IIQ", 9, 0, 10**9)), "arrays should have"),
        (header(0, 1, text("k"), struct.pack("<IIQ", 9, 8, 10**9)), "arrays should have"),
        (header(0, 1, text("k"), struct.pack("<IQ", 8, 10**10)), "a header at most 256,000,000"),
        (
            header(0, 1, text("k"), struct.pack("<IIQ", 9, 8, 2), struct.pack("<Q", 10**10)),
            "a header at most 256,000,000",
        ),
    ],
)
def test_a_large_file_cannot_ask_for_more_either(raw: bytes, reason: str, tmp_path: Path) -> None:
    """Here every length lies within the file."""
    path = large(tmp_path / "m.gguf", raw, 20_000_000_000)
    start = time.monotonic()
    with pytest.raises(FileError, match=reason):
        gguf.read(path)
    assert time.monotonic() - start < 2


def test_the_types_are_those_of_the_gguf_package() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    assert {name: (number, *size) for name, (number, *size) in gguf.TYPES.items()} == {
        type.name: (int(type), *size) for type, size in GGML_QUANT_SIZES.items()
    }
