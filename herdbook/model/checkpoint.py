"""Reading a model from disk and writing one: Hugging Face folders and GGUF files.

A checkpoint is opened (headers, configuration, names checked) before any weight is read; then the
tensors come one by one, so that loading needs the memory of the result and of one tensor.

    folder/config.json, model.safetensors or its shards and model.safetensors.index.json
    model.gguf
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from herdbook.errors import FamilyError, FileError
from herdbook.files import gguf
from herdbook.files.atomic import replacing, write_json
from herdbook.files.safetensors import Entry, read_header, refuse_pickles
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_gguf, by_source, families
from herdbook.model.family import (
    Family,
    SourceTensor,
    gguf_metadata,
    llama3_from_divisors,
    refuse_unsaid,
    source_from_gguf,
)
from herdbook.model.layers import Int4Linear, Int8Linear, rope_divisors
from herdbook.model.precision import compute_dtype

INDEX = "model.safetensors.index.json"
#: tensors that some checkpoints carry and nothing needs, as they can be computed: rotary frequencies,
#: and the causal masks of 2019–2023 (GPT-2's attn.bias is one)
COMPUTED = re.compile(
    r"(.*\.)?rotary(_pos)?_emb\.inv_freq|rope_freqs\.weight"
    r"|.*\.attn\.(bias|masked_bias|causal_mask|embed_positions)|.*\.attention\.(bias|masked_bias)"
)
#: general.file_type
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}


class TokenizerLike(Protocol):
    """What saving asks of a tokenizer."""

    def save(self, folder: Path) -> None: ...

    def gguf_metadata(self, rows: int | None = None) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, understood and checked, its weights not yet read."""

    path: Path
    family: Family
    config: DecoderConfig
    source_config: dict[str, Any]  # under Hugging Face's keys
    headless: bool
    #: our name → the source's tensor that holds it
    names: dict[str, SourceTensor] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)  # by our name
    files: dict[str, Path] = field(repr=False)  # safetensors: the source's name → its file
    gguf: gguf.GGUF | None = field(repr=False, default=None)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor by our name, dequantised, in memory of its own."""
        source = self.names[name].name
        if self.gguf is None:
            with safe_open(self.files[source], "pt") as file:
                tensor: Tensor = self._mine(name, file.get_tensor(source))
        elif len(self.shapes[name]) == 1:
            tensor = self._mine(name, torch.from_numpy(self.gguf.array(source)))
        else:  # our rows alone are dequantised: of stacked experts, one
            mine = self._mine(name, torch.from_numpy(self.gguf.raw(source)))
            type = self.gguf.tensors[source].type
            tensor = torch.from_numpy(gguf.dequantise(mine.contiguous().numpy(), type))
        return tensor.to(dtype, copy=True).contiguous()

    def _mine(self, name: str, tensor: Tensor) -> Tensor:
        """Our tensor out of the source's."""
        source = self.names[name]
        if source.fold is None:
            return tensor
        rows = [self.shapes[one][0] for one in source.ours]
        return source.fold.take(tensor, source.ours.index(name), rows, self.config)

    def blocks(self, name: str) -> tuple[str, Tensor] | None:
        """A GGUF tensor in blocks of 32: its type and the bytes [rows, B, bytes a block], else None."""
        if self.gguf is None:
            return None
        source = self.names[name].name
        tensor = self.gguf.tensors[source]
        if tensor.type not in ("Q4_0", "Q4_1", "Q8_0"):
            return None
        raw = torch.from_numpy(self.gguf.raw(source))
        whole = raw.view(*tensor.shape[:-1], tensor.shape[-1] // gguf.BLOCK, -1)
        return tensor.type, self._mine(name, whole)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Understand what lies at `path`: a Hugging Face folder, a folder with model.gguf, a .gguf file."""
    path = Path(path)
    refuse_pickles(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _open_folder(path)
        if (path / "model.gguf").is_file():
            return _open_gguf(path / "model.gguf")
        raise _no_model(path)
    if not path.exists():
        raise FileError(f"{path}", rule="is not there", next="check the path, or see `herd list`")
    return _open_gguf(path)


def _no_model(folder: Path) -> FileError:
    return FileError(
        f"{folder}",
        rule="holds no model: no config.json with .safetensors, no model.gguf",
        next="give the folder that holds config.json, or a .gguf file",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a foreign file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}", rule=f"is no JSON: {error}", next="fetch it again") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}", rule="holds no JSON object", next="fetch it again")
    return value


def expected_shapes(config: DecoderConfig, *, headless: bool = False) -> dict[str, tuple[int, ...]]:
    """Our name → shape, for every tensor of such a decoder."""
    with torch.device("meta"):
        decoder = Decoder(config, headless=headless)
    return {name: tuple(p.shape) for name, p in decoder.named_parameters()}


def source_shapes(
    expected: dict[str, tuple[int, ...]], names: dict[str, SourceTensor]
) -> dict[str, tuple[int, ...]]:
    """The source's tensors of such a model, in our order, each once, and their shapes."""
    sources = {one.name: one for one in names.values()}
    return {
        name: one.fold.shape([expected[ours] for ours in one.ours])
        if one.fold
        else expected[one.ours[0]]
        for name, one in sources.items()
    }


def _check_shapes(
    where: Path,
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
) -> None:
    """Every tensor of the source there, none left over, each in its shape."""
    next = "check that config and weights belong together, or fetch the model again"
    for source, shape in expected.items():
        if source not in found:
            raise FileError(f"{where}: tensor {source!r} is missing", rule="", next=next)
        if found[source] != shape:
            raise FileError(
                f"{where}: tensor {source!r} has the shape {list(found[source])}",
                rule=f"but the config asks for {list(shape)}",
                next=next,
            )
    left = [n for n in found if n not in expected and not COMPUTED.fullmatch(n)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise FileError(
            f"{where}: tensor {left[0]!r}{more}",
            rule="has no place in a model of this config",
            next=next,
        )


def _open_folder(folder: Path) -> Checkpoint:
    where = folder / "config.json"
    source = read_json(where)
    family = by_source(source, str(where))
    config = family.config(source, str(where))
    files, entries = _weight_files(folder)

    # a base model saved alone has no "model." (GPT-2: "transformer.") in front of its names
    front = family.names["embed"][0].partition(".")[0] + "."
    base = not any(name.startswith((front, f"language_model.{front}")) for name in entries)
    head = family.hf_name("head.weight")
    headless = not config.tied and head not in entries
    expected = expected_shapes(config, headless=headless)
    names = {name: family.hf_tensor(name, config) for name in expected}
    if base:
        names = {
            name: dataclasses.replace(one, name=one.name.removeprefix(front))
            for name, one in names.items()
        }
    found = {name: entry.shape for name, entry in entries.items()}
    if "text_config" in source:  # a model with eyes: its language model alone is read
        names = {
            name: dataclasses.replace(one, name=f"language_model.{one.name}")
            for name, one in names.items()
        }
        found = {name: s for name, s in found.items() if name.startswith("language_model.")}
        ids = {key: value for key, value in source.items() if key.endswith("_token_id")}
        source = family.source(config) | ids
    if config.tied and head in found:  # saved although it is the embedding: it must be
        shape = found.pop(head)
        embed = names["embed.weight"].name
        if shape != found.get(embed) or not _same(files, head, embed):
            raise FileError(
                f"{folder}: tensor {head!r} differs from {embed!r}",
                rule="but the config says that they are tied (tie_word_embeddings)",
                next="set tie_word_embeddings to false in config.json if the head is its own",
            )
    _check_shapes(folder, source_shapes(expected, names), found)
    return Checkpoint(folder, family, config, source, headless, names, expected, files)


def _same(files: dict[str, Path], a: str, b: str) -> bool:
    with safe_open(files[a], "pt") as one, safe_open(files[b], "pt") as two:
        return bool(torch.equal(one.get_tensor(a), two.get_tensor(b)))


def _weight_files(folder: Path) -> tuple[dict[str, Path], dict[str, Entry]]:
    """Each tensor's file and header entry, every header checked."""
    index = folder / INDEX
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise FileError(f"{index}", rule="has no weight_map", next="fetch it again")
        for name in set(map(str, listed.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise FileError(
                    f"{index} names the file {name!r}",
                    rule="but shards lie beside the index and end in .safetensors",
                    next="fetch the model again from a source that you trust",
                )
        shards = sorted(set(listed.values()))
    elif (folder / "model.safetensors").is_file():
        listed, shards = None, ["model.safetensors"]
    else:
        listed, shards = None, sorted(p.name for p in folder.glob("*.safetensors"))
    if not shards:
        raise _no_model(folder)
    files: dict[str, Path] = {}
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in read_header(folder / shard).items():
            if name in files:
                raise FileError(
                    f"{folder}: tensor {name!r} lies in {files[name].name} and in {shard}",
                    rule="but each tensor has one file",
                    next=f"leave only the model's own shards in the folder, with their {INDEX}",
                )
            files[name], entries[name] = folder / shard, entry
    for name, shard in (listed or {}).items():
        if name not in files or files[name].name != shard:
            raise FileError(
                f"{index} puts tensor {name!r} into {shard}",
                rule="but it does not lie there",
                next="fetch the model again",
            )
    return files, entries


def _understand(
    metadata: dict[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str
) -> tuple[Family, DecoderConfig, dict[str, Any]]:
    """What a GGUF's metadata and its tensors' names and shapes say; the last under Hugging Face's
    keys."""
    family = by_gguf(metadata.get("general.architecture"), metadata, tensors, where)
    embed = tensors.get(family.gguf_name("embed.weight"), ())
    if len(embed) != 2:
        raise FileError(
            f"{where}: tensor {family.gguf_name('embed.weight')!r} is missing",
            rule="so it is no language model (a vocabulary or an adapter alone?)",
            next="use the model's own .gguf file",
        )

    def has(name: str) -> bool:
        return family.knows(name) and family.gguf_name(name) in tensors

    source = source_from_gguf(metadata, family, embed[0], has, where)
    return family, family.config(source, where), source


def _open_gguf(path: Path) -> Checkpoint:
    file = gguf.read(path)
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    family, config, source = _understand(file.metadata, found, str(path))
    if "rope_freqs.weight" in file.tensors:
        divisors = torch.from_numpy(file.array("rope_freqs.weight").astype(np.float32)).flatten()
        scaling = None
        if len(divisors) == config.head_dim // 2:
            scaling = llama3_from_divisors(divisors, config)
        if scaling is None and not torch.equal(divisors, torch.ones_like(divisors)):
            raise FamilyError(
                f"{path}: rope_freqs.weight",
                rule="holds a rotary scaling that is not LLaMA 3's",
                next="use the model's safetensors, whose config names its scaling",
            )
        config = dataclasses.replace(config, rope_scaling=scaling)
    ids = {key: value for key, value in source.items() if key.endswith("_token_id")}
    expected = expected_shapes(config)
    names = {name: family.gguf_tensor(name, config) for name in expected}
    _check_shapes(path, source_shapes(expected, names), found)
    return Checkpoint(
        path, family, config, family.source(config) | ids, False, names, expected, {}, file
    )


def check_vocabulary(config: DecoderConfig, tokenizer_size: int) -> None:
    """Raise where the tokenizer knows ids that the embedding has no row for. Spare rows are fine."""
    if tokenizer_size > config.vocab:
        raise FileError(
            f"the tokenizer has {tokenizer_size:,} ids",
            rule=f"but the model's embedding has only {config.vocab:,} rows",
            next="use the tokenizer that belongs to the model",
        )


# --- loading ---------------------------------------------------------------------------------------


def load_decoder(
    path: Path | str, dtype: torch.dtype | None = None, quantised: bool = False
) -> Decoder:
    """The decoder at `path`, frozen (no gradients), in `dtype` (default: what the machine computes).

    quantised: matrices that a GGUF keeps as Q4_0, Q4_1 or Q8_0 stay so; the rest is in `dtype`.
    """
    checkpoint = open_checkpoint(path)
    dtype = dtype or compute_dtype()
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config, headless=checkpoint.headless)
    decoder.family = checkpoint.family.name
    decoder.source_config = dict(checkpoint.source_config)
    for name in checkpoint.names:
        module_name, _, leaf = name.rpartition(".")
        module = decoder.get_submodule(module_name)
        if leaf == "weight" and quantised and (made := _quantised(checkpoint, name, dtype)):
            _replace(decoder, module_name, made)
        elif leaf in dict(module.named_parameters(recurse=False)):
            tensor = checkpoint.read(name, dtype)
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    return decoder.eval()


def _quantised(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> nn.Module | None:
    """The layer that keeps this weight's blocks; None where it has none that a layer can keep."""
    found = checkpoint.blocks(name)
    if found is None or name == "embed.weight":  # rows are taken singly, and a tied head is dense
        return None
    type, raw = found
    scale = raw[..., :2].contiguous().view(torch.float16)[..., 0]
    if type == "Q8_0":
        codes = raw[..., 2:].contiguous().view(torch.int8)
        return Int8Linear(codes, scale.float(), _bias(checkpoint, name, dtype), dtype)
    if type == "Q4_1":
        minimum = raw[..., 2:4].contiguous().view(torch.float16)[..., 0]
        codes = raw[..., 4:].contiguous()
    else:
        minimum, codes = scale * -8, raw[..., 2:].contiguous()
    return Int4Linear(codes, scale, minimum, _bias(checkpoint, name, dtype), dtype)


def _bias(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor | None:
    bias = name.removesuffix("weight") + "bias"
    return checkpoint.read(bias, dtype) if bias in checkpoint.names else None


def _replace(decoder: Decoder, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(decoder.get_submodule(parent), leaf, module)


# --- saving ----------------------------------------------------------------------------------------


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
    if family.config(source, "config.json") != decoder.config:
        source.pop("rope_parameters", None)
        source |= family.write(decoder.config)
    return source


def save_hf(
    decoder: Decoder,
    tokenizer: TokenizerLike | None,
    folder: Path | str,
    dtype: torch.dtype,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a Hugging Face folder under the source's names and keys. config.json comes last."""
    folder, family = Path(folder), _family(decoder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    total = room = 0
    expected = expected_shapes(decoder.config, headless=decoder.headless)
    sources = {name: family.hf_tensor(name, decoder.config) for name in expected}
    by_name = {one.name: one for one in sources.values()}
    for name, shape in source_shapes(expected, sources).items():
        nbytes = int(np.prod(shape)) * dtype.itemsize
        if shards[-1] and room + nbytes > shard_bytes:
            shards.append([])
            room = 0
        shards[-1].append(name)
        room, total = room + nbytes, total + nbytes
    where: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        many = len(shards) > 1
        file = f"model-{i:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors"
        held = {n: source_tensor(decoder, by_name[n], dtype).contiguous() for n in names}
        with replacing(folder / file) as temporary:
            safetensors.torch.save_file(held, temporary, metadata={"format": "pt"})
        where |= dict.fromkeys(held, file)
    if len(shards) > 1:
        metadata = {"total_size": total}
        write_json(
            folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))}
        )
    if tokenizer is not None:
        tokenizer.save(folder)
    source = source_config(decoder)
    key = "dtype" if "dtype" in source else "torch_dtype"
    write_json(folder / "config.json", source | {key: str(dtype).removeprefix("torch.")})


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

    Vectors and learned positions stay F32; beside 4-bit matrices the embedding and the head have 8 bits, as they decide
    every word; rows that do not fill blocks of 32 stay F16.
    """
    if len(shape) == 1 or name == "places.weight":
        return "F32"
    if quant in ("Q4_0", "Q4_1") and name in ("embed.weight", "head.weight"):
        quant = "Q8_0"
    blocked = quant in ("Q4_0", "Q4_1", "Q8_0")
    return "F16" if blocked and shape[-1] % gguf.BLOCK else quant


def save_gguf(
    decoder: Decoder, tokenizer: TokenizerLike | None, path: Path | str, quant: str
) -> None:
    """Write one .gguf file. quant: F32, F16, BF16, Q8_0, Q4_0 or Q4_1 (see gguf_type)."""
    assert quant in FILE_TYPES, quant
    decoder.need_head()
    path, family, config = Path(path), _family(decoder), decoder.config
    said = gguf_metadata(config, family)
    metadata: dict[str, Any] = {
        "general.architecture": family.gguf,
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[quant],
        "general.quantization_version": 2,
    }
    expected = expected_shapes(config)
    sources = {name: family.gguf_tensor(name, config) for name in expected}
    by_name = {one.name: one for one in sources.values()}
    shapes = source_shapes(expected, sources)
    metadata |= said
    refuse_unsaid(config, _understand(metadata, shapes, str(path))[1])
    if tokenizer is not None:
        metadata |= tokenizer.gguf_metadata(config.vocab)
        check_vocabulary(config, len(metadata["tokenizer.ggml.tokens"]))
    found: list[tuple[str, str, Any]] = []
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain = config.rope_base ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        divisors = rope_divisors(plain, config.rope_scaling, config)
        found.append(("rope_freqs.weight", "F32", divisors.numpy()))
    for name, shape in shapes.items():
        source = by_name[name]
        waiting = _Waiting(decoder, source, shape)
        found.append((name, gguf_type(source.ours[0], shape, quant), waiting))
    gguf.write(path, metadata, found)
