"""A decoder is written: as a Hugging Face folder under its source's names, or as one .gguf file."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from herdbook.errors import FamilyError
from herdbook.files import gguf, safetensors
from herdbook.files.atomic import write_json
from herdbook.model.checkpoint import compressed
from herdbook.model.checkpoint.base import expected_shapes
from herdbook.model.checkpoint.huggingface import INDEX
from herdbook.model.checkpoint.weights import NAMES, as_bytes
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.families import families
from herdbook.model.family import Family, SourceTensor
from herdbook.model.gguf_config import gguf_metadata, refuse_unsaid, understand
from herdbook.model.layers import Int4Linear, Int8Embedding, Int8Linear
from herdbook.model.rope import rope_divisors, rope_frequencies
from herdbook.model.sources import check_vocabulary, source_shapes

#: of a file of weights, as transformers has it
SHARD_BYTES = 5_000_000_000
#: general.file_type
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}


class TokenizerLike(Protocol):
    """What saving asks of a tokenizer."""

    def save(self, folder: Path) -> None: ...

    def gguf_metadata(self, rows: int | None = None) -> dict[str, Any]: ...


def tensors(decoder: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by our name, dequantised, one at a time."""
    for name in expected_shapes(decoder.config, headless=decoder.headless):
        yield name, one_tensor(decoder, name, dtype)


def one_tensor(decoder: Decoder, name: str, dtype: torch.dtype) -> Tensor:
    module_name, _, leaf = name.rpartition(".")
    module: Any = decoder.get_submodule(module_name)
    assert hasattr(module, "dense"), f"{module_name} is a {type(module).__name__}: merge it first"
    tensor: Tensor = module.dense(dtype) if leaf == "weight" else module.bias.to(dtype)
    return tensor.detach().cpu()


def source_tensor(decoder: Decoder, source: SourceTensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the source, made of ours."""
    parts = [one_tensor(decoder, name, dtype) for name in source.ours]
    return parts[0] if source.fold is None else source.fold.join(parts, decoder.config)


def _family(decoder: Decoder) -> Family:
    return families()[decoder.family]


def source_config(decoder: Decoder) -> dict[str, Any]:
    """config.json's content: the source's own keys, brought up to date where the axes changed."""
    family, source = _family(decoder), dict(decoder.source_config)
    if not source:
        return family.source(decoder.config)
    plain = dataclasses.replace(decoder.config, labels=())
    if family.config(source, "config.json") != plain:
        source.pop("rope_parameters", None)
        source |= family.write(plain)
    if named := decoder.config.labels:
        architecture = re.sub("(ForCausalLM|LMHeadModel)$", "", family.architecture)
        source["architectures"] = [f"{architecture}ForSequenceClassification"]
        source["id2label"] = {str(n): one for n, one in enumerate(named)}
        source["label2id"] = {one: n for n, one in enumerate(named)}
    return source


def save_hf(
    decoder: Decoder,
    tokenizer: TokenizerLike | None,
    folder: Path | str,
    dtype: torch.dtype | Callable[[str], torch.dtype],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder under the source's names and keys. config.json comes last.

    dtype: of all tensors, or of each by our name: `open_checkpoint(source).dtype` gives those that
    the source has. A decoder loaded in a type that holds them all (float32 for F16 and BF16) is then
    saved with its source's very bytes.
    """
    folder = Path(folder)
    of = dtype if callable(dtype) else (lambda name: dtype)
    sources, shapes = _sources(decoder)
    write_weights(
        folder,
        {hf: (of(sources[hf].ours[0]), shape) for hf, shape in shapes.items()},
        lambda hf: source_tensor(decoder, sources[hf], of(sources[hf].ours[0])),
        shard_bytes=shard_bytes,
    )
    if tokenizer is not None:
        tokenizer.save(folder)
    source = source_config(decoder)
    expected = expected_shapes(decoder.config, headless=decoder.headless)
    most = max(expected, key=lambda name: math.prod(expected[name]))
    key = "dtype" if "dtype" in source else "torch_dtype"
    write_json(folder / "config.json", source | {key: str(of(most)).removeprefix("torch.")})


def _sources(decoder: Decoder) -> tuple[dict[str, SourceTensor], dict[str, tuple[int, ...]]]:
    """A Hugging Face folder's tensors by their names, and their shapes."""
    family = _family(decoder)
    shapes = expected_shapes(decoder.config, headless=decoder.headless)
    names = {name: family.hf_tensor(name, decoder.config) for name in shapes}
    return {one.name: one for one in names.values()}, source_shapes(shapes, names)


def need_rows(family: Family) -> None:
    """Raise where the source keeps its matrices so that compressed-tensors cannot quantise them."""
    if any(fold.transposed for fold in family.folds.values()):
        raise FamilyError(
            f"a model of the family {family.name}",
            rule="cannot be written as compressed-tensors: its matrices are [in, out] there, and "
            "groups lie along the inputs",
            next="quantise it as GGUF (format Q4_1 or Q8_0)",
        )


def save_compressed(
    decoder: Decoder,
    tokenizer: TokenizerLike | None,
    folder: Path | str,
    dtype: Callable[[str], torch.dtype],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder with the decoder's quantised layers as compressed-tensors has them, code by
    code, and all else in `dtype` by our name. config.json comes last.

    All quantised layers have the same bits and lie on the layout's grid (compressed.zero_points).
    """
    need_rows(_family(decoder))
    folder = Path(folder)
    sources, shapes = _sources(decoder)
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    packed: dict[str, list[compressed.Quantised]] = {}
    dense: list[str] = []
    for hf, shape in shapes.items():
        layers = [decoder.get_submodule(name.rpartition(".")[0]) for name in sources[hf].ours]
        module, _, leaf = hf.rpartition(".")
        kept = [one for one in layers if isinstance(one, Int4Linear | Int8Linear)]
        kept = [one for one in kept if not isinstance(one, Int8Embedding)]  # which stays dense
        if kept and leaf == "weight":
            assert len(kept) == len(layers), f"{module} is quantised in part"
            packed[module] = kept
            plan |= {f"{module}.{leaf}": of for leaf, of in compressed.plan(kept).items()}
        else:
            plan[hf] = dtype(sources[hf].ours[0]), shape
            if leaf == "weight" and len(shape) == 2:
                dense.append(module)
    (bits,) = {4 if isinstance(one, Int4Linear) else 8 for some in packed.values() for one in some}

    def tensor(name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        if module not in packed or leaf in ("weight", "bias"):
            return source_tensor(decoder, sources[name], plan[name][0])
        if leaf == compressed.SHAPE:
            return torch.tensor(shapes[f"{module}.weight"])
        parts = [compressed.part(one, leaf).cpu() for one in packed[module]]
        fold = sources[f"{module}.weight"].fold
        rows = torch.cat(parts) if fold is None else fold.join(parts, decoder.config)
        return compressed.packed(rows, leaf, bits, plan[name][0])

    write_weights(folder, plan, tensor, shard_bytes=shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)
    head = _family(decoder).hf_name("head.weight").removesuffix(".weight")  # to others a matrix,
    ignored = dict.fromkeys([*dense, head])  # even where it is the embedding
    write_json(
        folder / "config.json",
        source_config(decoder) | {compressed.KEY: compressed.config(bits, list(ignored))},
    )


def write_weights(
    folder: Path,
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    mark: Mapping[str, str] | None = None,
) -> None:
    """model.safetensors, or shards of at most `shard_bytes` with their index, in the plan's order.

    plan: the source's name → type and shape. tensor: asked for each name when its turn comes, so one
    is in memory at a time. mark: goes into every file's header.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    total = room = 0
    for name, (dtype, shape) in plan.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and room + nbytes > shard_bytes:
            shards.append([])
            room = 0
        shards[-1].append(name)
        room, total = room + nbytes, total + nbytes
    where: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        many = len(shards) > 1
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors"
        safetensors.write(
            folder / file,
            {name: (NAMES[plan[name][0]], plan[name][1]) for name in names},
            lambda name: as_bytes(tensor(name).contiguous()),
            {"format": "pt", **(mark or {})},
        )
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_size": total}
        write_json(
            folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))}
        )


class _Waiting:
    """A tensor of a decoder that the GGUF writer asks for when its turn comes."""

    def __init__(self, decoder: Decoder, source: SourceTensor, shape: tuple[int, ...]) -> None:
        self.decoder, self.source, self.shape = decoder, source, shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        tensor = source_tensor(self.decoder, self.source, torch.float32)
        if self.source.ours == ("head.weight",) and self.decoder.config.head_norm:
            tensor = nn.functional.normalize(tensor)  # llama.cpp would not norm it
        return tensor.contiguous().numpy()


def gguf_type(name: str, shape: tuple[int, ...], quant: str) -> str:
    """How a tensor of ours is stored in a file of this quantisation.

    Vectors, learned positions and routers stay F32 (a router decides which experts see a token, and
    rounded it decides otherwise); beside 4-bit matrices the embedding and the head have 8
    bits, as they decide every word; rows that do not fill blocks of 32 stay F16.
    """
    if len(shape) == 1 or name == "places.weight" or name.endswith(".router.weight"):
        return "F32"
    if quant in ("Q4_0", "Q4_1") and name in ("embed.weight", "head.weight"):
        quant = "Q8_0"
    blocked = quant in ("Q4_0", "Q4_1", "Q8_0")
    return "F16" if blocked and shape[-1] % gguf.BLOCK else quant


def gguf_head(
    config: DecoderConfig, family: Family, tokenizer: TokenizerLike | None
) -> dict[str, Any]:
    """The metadata of a GGUF of such a model, but for the file's own. FamilyError or FileError where a
    GGUF cannot say it."""
    if config.labels:
        raise FamilyError(
            "a model that classifies", rule="cannot be written as GGUF", next="use its folder"
        )
    metadata = {"general.architecture": family.gguf, **gguf_metadata(config, family)}
    expected = expected_shapes(config)
    names = {name: family.gguf_tensor(name, config) for name in expected}
    back = understand(metadata, source_shapes(expected, names), "the GGUF")[1]
    refuse_unsaid(config, back)
    if tokenizer is not None:
        metadata |= tokenizer.gguf_metadata(config.vocab)
        check_vocabulary(config, len(metadata["tokenizer.ggml.tokens"]))
    return metadata


def save_gguf(
    decoder: Decoder, tokenizer: TokenizerLike | None, path: Path | str, quant: str
) -> None:
    """Write one .gguf file. quant: F32, F16, BF16, Q8_0, Q4_0 or Q4_1 (see gguf_type)."""
    assert quant in FILE_TYPES, quant
    decoder.need_head()
    path, family, config = Path(path), _family(decoder), decoder.config
    metadata = gguf_head(config, family, tokenizer) | {
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[quant],
        "general.quantization_version": 2,
    }
    expected = expected_shapes(config)
    names = {name: family.gguf_tensor(name, config) for name in expected}
    sources = {one.name: one for one in names.values()}
    found: list[tuple[str, str, Any]] = []
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
        divisors = rope_divisors(plain, config.rope_scaling, config)
        found.append(("rope_freqs.weight", "F32", divisors))
    for name, shape in source_shapes(expected, names).items():
        waiting = _Waiting(decoder, sources[name], shape)
        found.append((name, gguf_type(sources[name].ours[0], shape, quant), waiting))
    gguf.write(path, metadata, found)
