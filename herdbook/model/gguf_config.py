"""GGUF's metadata as a configuration, and back: what a file of llama.cpp says of its model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from herdbook.errors import FamilyError, FileError
from herdbook.files import gguf
from herdbook.model.config import DecoderConfig
from herdbook.model.families import by_gguf
from herdbook.model.family import Family
from herdbook.model.gguf_keys import folded_for_gguf, llama3_from_divisors, short
from herdbook.model.keys import Keys
from herdbook.model.sources import check_sizes, read_config


def gguf_file(path: Path) -> Path | None:
    """The GGUF that a model's path means: itself, or the one in a folder that has no config.json."""
    if path.is_dir():
        file = path / "model.gguf"
        return file if file.is_file() and not (path / "config.json").is_file() else None
    return None if path.suffix == ".pth" else path


def understand(
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

    try:
        source = source_from_gguf(metadata, family, embed[0], has, where)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise FamilyError(
            f"{where}: {error}",
            rule=f"so a key of its metadata is not what a {family.gguf} model has there",
            next="fetch the file again, or convert it anew",
        ) from error
    return family, read_config(family, source, where), source


def read(
    file: gguf.GGUF, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Family, DecoderConfig, dict[str, Any]]:
    """What a whole file says, its scaling of positions included; the last as `understand` gives it."""
    family, config, source = understand(file.metadata, shapes, str(file.path))
    check_sizes(file.path, config, shapes)
    if "rope_freqs.weight" in file.tensors:
        config = _scaled(config, file)
    return family, config, source


def source_from_gguf(
    metadata: dict[str, Any], family: Family, vocab: int, has: Callable[[str], bool], where: str
) -> dict[str, Any]:
    """GGUF's metadata under Hugging Face's keys. has(our name): whether such a tensor is there."""
    prefix = family.gguf + "."
    found = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    keys = Keys(found, where)
    source = {hf: short(keys.take(ours)) for hf, ours in family.gguf_keys.items()}
    source = {hf: value for hf, value in source.items() if value is not None}
    source |= {"vocab_size": vocab, "tie_word_embeddings": not has("head.weight")}
    family.read_gguf(keys, source, has)
    keys.finish()
    for name in ("bos", "eos", "padding"):
        id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None:
            source[f"{'pad' if name == 'padding' else name}_token_id"] = id
    return source


def _scaled(config: DecoderConfig, file: gguf.GGUF) -> DecoderConfig:
    """With LLaMA 3's rotary scaling, which GGUF keeps as a tensor."""
    name = "rope_freqs.weight"
    scaling, plain = None, False
    if math.prod(file.tensors[name].shape) == config.head_dim // 2:
        divisors = file.array(name).astype(np.float32).flatten()
        plain = bool((divisors == 1).all())
        if np.isfinite(divisors).all():
            scaling = llama3_from_divisors(divisors, config)
    if scaling is None and not plain:
        raise FamilyError(
            f"{file.path}: rope_freqs.weight",
            rule="holds a rotary scaling that is not LLaMA 3's",
            next="use the model's safetensors, whose config names its scaling",
        )
    return dataclasses.replace(config, rope_scaling=scaling)


def gguf_metadata(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The axes as GGUF's metadata, under the family's architecture."""
    if not family.gguf:
        raise FamilyError(
            f"a model of the family {family.name}",
            rule="cannot be written as GGUF, nor so quantised: llama.cpp does not know it, or not as "
            "Herdbook computes it",
            next="quantise it with the format int4 or int8, or export it as a Hugging Face folder "
            "(herd export --to hf)",
        )
    source = {hf: value for hf, value in family.write(config).items() if value is not None}
    known = {gguf: source[hf] for hf, gguf in family.gguf_keys.items() if hf in source}
    known |= family.write_gguf(config, source)
    return {f"{family.gguf}.{key}": value for key, value in known.items()}


def refuse_unsaid(config: DecoderConfig, back: DecoderConfig) -> None:
    """Raise where the axes, read back from GGUF's metadata, are not those that were written."""
    here = folded_for_gguf(config)
    for axis in dataclasses.fields(config):
        was, now = getattr(here, axis.name), getattr(back, axis.name)
        if was != now and not (isinstance(was, float) and math.isclose(was, now, rel_tol=1e-6)):
            raise FamilyError(
                f"a model with {axis.name} {was}",
                rule=f"cannot be written as GGUF: the format has no keys for it and means {now}",
                next="export it as a Hugging Face folder (--to hf)",
            )
