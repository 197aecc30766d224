"""The embedding and the head in peft's layout: trained whole, or some of their rows.

    base_model.model.<module>.weight                               [V, H]   modules_to_save
    base_model.model.<module>.token_adapter.trainable_tokens_delta [n, H]   trainable_token_indices

The latter are the rows themselves, by no means differences. A head that is tied to the embedding is
written as both where it is trained whole, so that peft, which unties that, computes the same; of rows
peft keeps the tie, and one tensor says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herdbook.errors import FileError
from herdbook.model.decoder import Decoder
from herdbook.model.families import families
from herdbook.model.lora import Adapter
from herdbook.model.whole import TrainedRows, Whole, train_rows, train_whole
from herdbook.training.peft_matrices import PREFIX, Tensors

#: what a layer that is trained whole consists of, here and there
WHOLE = {"matrix": "weight", "vector": "bias"}
ROWS = "token_adapter.trainable_tokens_delta"
#: modules that transformers 5 calls otherwise than the tensors of a folder (GPT-NeoX)
RENAMED = {"embed_out.weight": "lm_head.weight"}


@dataclass(frozen=True)
class Table:
    """Of an embedding or a head: its matrix (and vector), or the rows of some ids."""

    tensors: Mapping[str, Tensor]
    ids: Tensor | None = None

    def put(self, decoder: Decoder, name: str) -> Adapter:
        """Onto the decoder's "embed" or "head"."""
        made = (
            train_whole(decoder, name) if self.ids is None else train_rows(decoder, name, self.ids)
        )
        with torch.no_grad():
            for mine, tensor in self.tensors.items():
                getattr(made, mine).copy_(tensor)
        return made


def write_whole(
    decoder: Decoder, adapters: Mapping[str, Adapter]
) -> tuple[Tensors, dict[str, Any]]:
    """peft's tensors and settings."""
    tensors: Tensors = {}
    whole: list[str] = []
    rows: dict[str, list[int]] = {}
    for name, one in adapters.items():
        if isinstance(one, TrainedRows):
            module = _modules(decoder, name)[0]
            rows[module.rpartition(".")[2]] = one.ids.tolist()
            tensors[f"{PREFIX}{module}.{ROWS}"] = one.rows.detach().clone()
        elif isinstance(one, Whole):
            for module in _modules(decoder, name):
                whole.append(module.rpartition(".")[2])
                for mine, leaf in WHOLE.items():
                    if (tensor := getattr(one, mine)) is not None:
                        tensors[f"{PREFIX}{module}.{leaf}"] = tensor.detach().clone()
    about: dict[str, Any] = {"modules_to_save": sorted(whole)} if whole else {}
    return tensors, about | ({"trainable_token_indices": rows} if rows else {})


def _modules(decoder: Decoder, name: str) -> list[str]:
    """The source's modules that hold our embedding or head; a tied one is both."""
    names = ("embed", "head") if name == "embed" and decoder.head is None else (name,)
    family = families()[decoder.family]
    found = (family.hf_tensor(f"{one}.weight", decoder.config).name for one in names)
    return [RENAMED.get(one, one).removesuffix(".weight") for one in found]


def read_whole(
    decoder: Decoder, tensors: Tensors, config: Mapping[str, Any], file: Path
) -> dict[str, Table]:
    """Take embedding and head out of the tensors: "embed" or "head" → what was trained of it."""
    found = _read_rows(decoder, tensors, config.get("trainable_token_indices"), file)
    tied = decoder.head is None
    for name in ("embed",) if tied else ("embed", "head"):
        layer: Any = decoder.get_submodule(name)
        shapes = {"matrix": layer.dense(torch.float32).shape}
        if getattr(layer, "bias", None) is not None:
            shapes["vector"] = layer.bias.shape
        modules = _modules(decoder, name)
        mine: Tensors = {}
        for one, shape in shapes.items() if config.get("modules_to_save") else ():
            keys = [f"{PREFIX}{module}.{WHOLE[one]}" for module in modules]
            got = [tensors.pop(key) for key in keys if key in tensors]
            if not got:
                continue
            if len(got) < len(keys) or any(not torch.equal(got[0], other) for other in got[1:]):
                raise _untied(file, keys[0], keys[-1])
            if got[0].shape != shape:
                raise FileError(
                    f"{file}: {keys[0]} is {list(got[0].shape)}",
                    rule=f"but the base's is {list(shape)}",
                    next="use the base with the vocabulary that it was trained for",
                )
            mine[one] = got[0]
        if mine:
            found[name] = Table(mine)
    return found


def _read_rows(decoder: Decoder, tensors: Tensors, indices: Any, file: Path) -> dict[str, Table]:
    found: dict[str, Table] = {}
    if not indices:
        return found
    names = ("embed",) if decoder.head is None else ("embed", "head")
    modules = {name: _modules(decoder, name) for name in names}
    if isinstance(indices, list):  # of the embedding, whatever its name
        indices = {modules["embed"][0]: indices}
    tied = modules["embed"][1:]  # other names of the embedding
    for key in [one for one in tensors if one.endswith(f".{ROWS}")]:
        module = key.removeprefix(PREFIX).removesuffix(f".{ROWS}")
        if module in tied:
            raise _untied(file, f"{PREFIX}{modules['embed'][0]}.{ROWS}", key)
        name = next((one for one, its in modules.items() if module == its[0]), None)
        ids = next((ids for end, ids in indices.items() if f".{module}".endswith(f".{end}")), None)
        layer: Any = decoder.get_submodule(name) if name else None
        vocab = decoder.config.vocab
        if name is None or not isinstance(ids, list) or not ids:
            raise FileError(
                f"{file}: {key}",
                rule="are rows of no embedding and no head, or of no tokens that the settings name",
                next="check that the adapter was made for this base model",
            )
        if not all(type(one) is int and 0 <= one < vocab for one in ids) or len(set(ids)) < len(
            ids
        ):
            raise FileError(
                f"{file}: trainable_token_indices of {module}",
                rule=f"must be different ids from 0 to {vocab - 1}",
                next="use the base with the vocabulary that it was trained for",
            )
        wanted = [len(ids), layer.dense(torch.float32).shape[1]]
        if list(tensors[key].shape) != wanted:
            raise FileError(
                f"{file}: {key} is {list(tensors[key].shape)}",
                rule=f"but the settings and the base ask for {wanted}",
                next="check that the adapter was made for this base model",
            )
        found[name] = Table({"rows": tensors.pop(key)}, torch.tensor(ids))
    return found


def _untied(file: Path, one: str, other: str) -> FileError:
    return FileError(
        f"{file}: {one}",
        rule=f"is not what {other} is, and this base has one matrix for both",
        next="merge it with the library that made it, and use the merged model",
    )
