"""compressed-tensors: quantised matrices in a Hugging Face folder, as transformers and vLLM read them.

O outputs, I inputs, G groups of a row, W = 32 / bits codes in a word, the first in its lowest bits.

    config.json             quantization_config: {quant_method: compressed-tensors, config_groups …}
    NAME.weight_packed      int32 [O, I / W]     codes
    NAME.weight_scale       float [O, G]         of I / G inputs each; G = 1: of the whole row
    NAME.weight_zero_point  int32 [⌈O / W⌉, G]   packed down the rows; without it 2^(bits − 1)
    NAME.weight_shape       int64 [2]            O, I

    w = scale · (code − zero point)

Read is what the layers here hold: 4 bits with or without zero points, 8 bits without, in groups of
32 or a multiple of it, or whole rows; of the weights alone. Written are groups of 32, 4 bits with zero
points.
Source: https://github.com/vllm-project/compressed-tensors (format "pack-quantized")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.model.at_once import Step, at_once
from herdbook.model.checkpoint.weights import STRIP_BYTES, Blocks, PlainWeights, Weights
from herdbook.model.layers import BLOCK, Int4Linear, Int8Linear

KEY = "quantization_config"
METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, ZERO, SHAPE = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

#: what does not change the weights, or says nothing by these values
SILENT = {"version", "quantization_status", "global_compression_ratio", "ignore", "quant_method"}
NOTHING: tuple[Any, ...] = (None, {}, [], False)


@dataclass(frozen=True)
class Scheme:
    """How a group of matrices is kept. group: inputs that share a scale; 0: all."""

    bits: int
    group: int
    symmetric: bool


def schemes(config: Any, where: str) -> frozenset[Scheme]:
    """Those that a quantization_config names. FileError where one is not of those above."""

    def refuse(key: str, value: Any, rule: str) -> FileError:
        return FileError(
            f"{where}: {KEY} has {key} {str(value)[:200]!r}",
            rule=rule,
            next="use the model's files before they were quantised, or a GGUF of it",
        )

    def only(place: str, found: Any, known: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """A mapping whose values are among those known, and all else of which says nothing."""
        if not isinstance(found, dict):
            raise refuse(place or KEY, found, "but must be a mapping")
        for key, value in found.items():
            wanted = known.get(key, NOTHING)
            if wanted and not any(type(value) is type(one) and value == one for one in wanted):
                shown = ", ".join(repr(one) for one in wanted)
                raise refuse(f"{place}{key}", value, f"and Herdbook reads only {shown}")
        return found

    free: dict[str, tuple[Any, ...]] = dict.fromkeys(SILENT, ())
    if isinstance(config, dict) and config.get("quant_method") != METHOD:
        raise refuse("quant_method", config.get("quant_method"), f"and Herdbook reads {METHOD}")
    config = only("", config, free | {"format": (FORMAT,), "config_groups": ()})
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise refuse("config_groups", groups, "but must name at least one")
    found = set[Scheme]()
    for group in groups.values():
        known: dict[str, tuple[Any, ...]] = {"targets": (), "format": (FORMAT, None), "weights": ()}
        weights = only("config_groups.", group, known).get("weights")
        known = {
            "num_bits": (4, 8),
            "type": ("int",),
            "strategy": ("group", "channel"),
            "symmetric": (True, False),
            "group_size": (),
            "dynamic": (False,),
            "actorder": ("weight", "static", False, None),  # only how it was calibrated
        } | dict.fromkeys(("observer", "observer_kwargs", "scale_dtype", "zp_dtype"), ())
        weights = only("weights.", weights, known)
        for key in ("num_bits", "strategy"):
            if key not in weights:
                raise refuse(f"weights.{key}", None, "but must say it")
        size, symmetric = weights.get("group_size"), weights.get("symmetric", True)
        if weights["strategy"] == "channel":
            size = 0
        elif type(size) is not int or size < BLOCK or size % BLOCK:
            raise refuse("weights.group_size", size, f"and Herdbook reads multiples of {BLOCK}")
        if weights["num_bits"] == 8 and not symmetric:
            raise refuse("weights.symmetric", symmetric, "and of 8 bits Herdbook reads only true")
        found.add(Scheme(weights["num_bits"], size, symmetric))
    return frozenset(found)


class CompressedWeights(Weights):
    """Quantised matrices under the names that they had before, dequantised as they are read."""

    def __init__(self, plain: PlainWeights, known: frozenset[Scheme], where: str) -> None:
        self.plain, self.files, self.where = plain, plain.files, where
        self.schemes: dict[str, Scheme] = {}
        self.shapes = dict(plain.shapes)
        for packed in plain.shapes:
            module, _, leaf = packed.rpartition(".")
            if leaf == PACKED:
                self._understand(module, known)

    def _understand(self, module: str, known: frozenset[Scheme]) -> None:
        """Find the scheme that the shapes and types of a module's tensors are of."""
        names = {leaf: f"{module}.{leaf}" for leaf in (PACKED, SCALE, ZERO, SHAPE)}
        mine = {leaf: name for leaf, name in names.items() if name in self.plain.shapes}
        shapes = {leaf: self.shapes.pop(name) for leaf, name in mine.items()}
        types = {leaf: self.plain.dtype(name) for leaf, name in mine.items()}
        size: list[int] = []
        if shapes.get(SHAPE) == (2,) and types[SHAPE] in (torch.int64, torch.int32):
            size = self.plain.read(names[SHAPE], torch.int64).tolist()
        whole = f"{module}.weight" not in self.plain.shapes  # nor is it there a second time
        whole = whole and not any(self.plain.parts[name][0].entry.strides for name in mine.values())
        for scheme in known if size and whole and SCALE in mine else ():
            rows, columns = size
            words, group = 32 // scheme.bits, scheme.group or columns
            wanted = {
                PACKED: (rows, columns // words),
                SCALE: (rows, columns // max(group, 1)),
                SHAPE: (2,),
            }
            if not scheme.symmetric:
                wanted[ZERO] = (-(-rows // words), wanted[SCALE][1])
            words_fit = all(types[one] == torch.int32 for one in (PACKED, ZERO) if one in mine)
            even = rows > 0 and columns > 0 and columns % BLOCK == 0 and columns % group == 0
            if even and words_fit and shapes == wanted and types[SCALE].is_floating_point:
                self.shapes[f"{module}.weight"] = (rows, columns)
                self.schemes[f"{module}.weight"] = scheme
                return
        raise FileError(
            f"{self.where}: {module}.{PACKED} beside "
            + ", ".join(f"{leaf} {list(shape)}" for leaf, shape in shapes.items()),
            rule=f"is no matrix {size or ''} in blocks of {BLOCK} that its {KEY} names",
            next="fetch the model again, or use its files before they were quantised",
        )

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.schemes else self.plain.dtype(name)

    def same(self, one: str, other: str) -> bool:
        return not {one, other} & set(self.schemes) and self.plain.same(one, other)

    def in_rows(self, name: str) -> bool:
        return name not in self.schemes and self.plain.in_rows(name)

    def steps(self, name: str, out: Tensor, row_of: Tensor | None = None) -> Iterable[Step]:
        if name not in self.schemes:
            return self.plain.steps(name, out, row_of)
        return [partial(self._strip, name, out, *rows) for rows in self._strips(name)]

    def _strip(self, name: str, out: Tensor, first: int, last: int) -> None:
        codes, scale, zero = self._rows(name, first, last)
        codes = codes.float().sub_(zero[..., None]).mul_(scale[..., None])
        out[first:last] = codes.flatten(1)

    def blocks(
        self, name: str, row_of: Tensor | None = None
    ) -> tuple[Blocks, Iterable[Step]] | None:
        if name not in self.schemes:
            return None
        rows, columns = self.shapes[name]
        four = self.schemes[name].bits == 4
        count, half = columns // BLOCK, BLOCK // 2
        kept = torch.empty(rows, count, half if four else BLOCK, dtype=torch.uint8)
        scales, minima = torch.empty(rows, count), torch.empty(rows, count)

        def strip(first: int, last: int) -> None:
            codes, scale, zero = self._rows(name, first, last)
            kept[first:last] = codes[..., :half] | codes[..., half:] << 4 if four else codes ^ 128
            scales[first:last], minima[first:last] = scale, scale * -zero

        at_once(partial(strip, *rows) for rows in self._strips(name))
        if not four:
            found = Blocks(kept.view(torch.int8), scales, None)
        elif all(torch.equal(one, one.half().float()) for one in (scales, minima)):
            found = Blocks(kept, scales.half(), minima.half())
        else:
            found = Blocks(kept, scales, minima)
        return (found if row_of is None else found.map(lambda whole: whole[row_of])), ()

    def _strips(self, name: str) -> list[tuple[int, int]]:
        """First and last row of strips that begin with a word of zero points."""
        rows, columns = self.shapes[name]
        count = max(8, STRIP_BYTES // (4 * columns) // 8 * 8)
        return [(first, min(first + count, rows)) for first in range(0, rows, count)]

    def _rows(self, name: str, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [n, B, 32], scale and zero point float32 [n, B] of some rows."""
        module, scheme = name.removesuffix(".weight"), self.schemes[name]
        count = self.shapes[name][1] // BLOCK
        codes = self.plain.rows(f"{module}.{PACKED}", first, last).view(torch.uint8)
        codes = _halves(codes) if scheme.bits == 4 else codes
        scale = self.plain.rows(f"{module}.{SCALE}", first, last).float()
        each = count // scale.shape[1]
        zero = torch.full_like(scale, 1 << (scheme.bits - 1))
        if not scheme.symmetric:
            words = self.plain.rows(f"{module}.{ZERO}", first // 8, -(-last // 8))
            down = _halves(words[..., None].view(torch.uint8)).transpose(1, 2)  # [words, 8, G]
            zero = down.flatten(0, 1)[: last - first].float()
        codes = codes.view(last - first, count, BLOCK)
        return codes, scale.repeat_interleave(each, 1), zero.repeat_interleave(each, 1)


def _halves(bytes: Tensor) -> Tensor:
    """uint8 [..., n] → the halves of each byte in turn, low then high: [..., 2n]."""
    return torch.stack([bytes & 15, bytes >> 4], -1).flatten(-2)


# --- writing ---------------------------------------------------------------------------------------

Quantised = Int4Linear | Int8Linear


def zero_points(layer: Int4Linear) -> Tensor | None:
    """uint8 [O, B]; None where the layer's minima are not whole steps below zero (as Q4_1's are)."""
    scale, minimum = layer.scale.float(), layer.minimum.float()
    zero = (-minimum / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 15)
    return zero.to(torch.uint8) if torch.equal(zero * scale, -minimum) else None


def plan(layers: Sequence[Quantised]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Leaf → type and shape of the tensors that matrices with the same inputs become, end to end."""
    rows, columns = sum(one.outputs for one in layers), layers[0].inputs
    scale = torch.cat([_scale(one) for one in layers])
    of = next(t for t in (torch.float16, torch.bfloat16, torch.float32) if _exact(scale, t))
    if isinstance(layers[0], Int8Linear):
        found = {PACKED: (torch.int32, (rows, columns // 4))}
    else:
        found = {PACKED: (torch.int32, (rows, columns // 8))}
        found[ZERO] = (torch.int32, (-(-rows // 8), columns // BLOCK))
    return found | {SCALE: (of, (rows, columns // BLOCK)), SHAPE: (torch.int64, (2,))}


def part(layer: Quantised, leaf: str) -> Tensor:
    """What a layer gives to the tensor of this name, a row for each of its outputs."""
    if leaf == SCALE:
        return _scale(layer)
    if isinstance(layer, Int8Linear):
        return layer.codes.view(torch.uint8) ^ 128
    if leaf == PACKED:
        return torch.cat([layer.codes & 15, layer.codes >> 4], -1)
    zero = zero_points(layer)
    assert zero is not None, "a layer off this layout's grid is rounded first"
    return zero


def packed(rows: Tensor, leaf: str, bits: int, dtype: torch.dtype) -> Tensor:
    """The tensor of this name, from its rows in the source's order."""
    if leaf == SCALE:
        return rows.to(dtype)
    if leaf == ZERO:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % 8))
        return _words(rows.view(-1, 8, rows.shape[1]).transpose(1, 2), 4)[..., 0]
    return _words(rows.flatten(1), bits)


def _words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] → int32 [..., n · bits / 32]."""
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    words = codes.reshape(-1).view(torch.int32)
    return words.view(*codes.shape[:-1], -1)


def _scale(layer: Quantised) -> Tensor:
    scale = layer.scale if isinstance(layer, Int4Linear) else layer.scale[..., 0]
    return scale.float()


def _exact(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).float(), values)


def config(bits: int, ignored: Sequence[str]) -> dict[str, Any]:
    """The quantization_config of what is written. ignored: modules with a matrix that stayed dense."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": bits == 8,
        "strategy": "group",
        "group_size": BLOCK,
        "dynamic": False,
    }
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    group |= {"input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
    }
