"""What a family is: how a source's configuration and tensor names become the decoder's, and back.

A description (one short file in families/) is:

- `names`: one table, ours → (Hugging Face's, GGUF's), used to load and to save. `{n}` is the layer.
  A row names a module; its tensors are `.weight` and, where the axes ask for it, `.bias`. A source's
  name that ends in = is that of the tensor itself.
- `folds`: where a source packs several of ours into one tensor, or keeps one in another order.
- `read` and `write`: the source's configuration → axes, and axes → the keys Hugging Face uses
  (`herdbook/model/keys.py`). GGUF's metadata is first put under Hugging Face's keys
  (`herdbook/model/gguf_keys.py`), so that there is one reading.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from herdbook.model.config import DecoderConfig
from herdbook.model.folds import K_ROTATING, Q_ROTATING, Fold
from herdbook.model.gguf_keys import GGUF_KEYS, read_gguf_llama, write_gguf_llama
from herdbook.model.keys import Keys

Names = dict[str, tuple[str, str]]

#: the names of LLaMA's modules, which most families share
LLAMA_NAMES: Names = {
    "embed": ("model.embed_tokens", "token_embd"),
    "blocks.{n}.attention_norm": ("model.layers.{n}.input_layernorm", "blk.{n}.attn_norm"),
    "blocks.{n}.attention.q": ("model.layers.{n}.self_attn.q_proj", "blk.{n}.attn_q"),
    "blocks.{n}.attention.k": ("model.layers.{n}.self_attn.k_proj", "blk.{n}.attn_k"),
    "blocks.{n}.attention.v": ("model.layers.{n}.self_attn.v_proj", "blk.{n}.attn_v"),
    "blocks.{n}.attention.o": ("model.layers.{n}.self_attn.o_proj", "blk.{n}.attn_output"),
    "blocks.{n}.mlp_norm": ("model.layers.{n}.post_attention_layernorm", "blk.{n}.ffn_norm"),
    "blocks.{n}.mlp.gate": ("model.layers.{n}.mlp.gate_proj", "blk.{n}.ffn_gate"),
    "blocks.{n}.mlp.up": ("model.layers.{n}.mlp.up_proj", "blk.{n}.ffn_up"),
    "blocks.{n}.mlp.down": ("model.layers.{n}.mlp.down_proj", "blk.{n}.ffn_down"),
    "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
}

#: GGUF holds q and k of LLaMA as Meta does, pairs side by side
GGUF_ROTATING = {
    "blk.{n}.attn_q": Fold(("blocks.{n}.attention.q",), Q_ROTATING),
    "blk.{n}.attn_k": Fold(("blocks.{n}.attention.k",), K_ROTATING),
}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint: its name there, which of ours it holds, and how."""

    name: str
    ours: tuple[str, ...]
    fold: Fold | None


@dataclass(frozen=True)
class Family:
    """A description. See the module's head."""

    model_type: str  # Hugging Face's
    architecture: str  # the class that Hugging Face loads it with
    gguf: str  # general.architecture; empty: llama.cpp does not know the family
    names: Names
    read: Callable[[Keys], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    #: Hugging Face's key → GGUF's, and what else GGUF's metadata says, both ways
    gguf_keys: Mapping[str, str] = field(default_factory=lambda: GGUF_KEYS)
    read_gguf: Callable[[Keys, dict[str, Any], Callable[[str], bool]], None] = read_gguf_llama
    write_gguf: Callable[[DecoderConfig, dict[str, Any]], dict[str, Any]] = write_gguf_llama
    #: what llama.cpp computes otherwise of such a file, for who exports one; empty: nothing
    gguf_note: Callable[[DecoderConfig], str] = lambda config: ""
    #: model_types of other sources that say the same under the same names
    also: tuple[str, ...] = ()
    #: whether a config.json of this model_type is this family's, where another shares it
    mine: Callable[[dict[str, Any]], bool] = lambda source: True
    #: rows of `names` that are others in some configurations
    renamed: Callable[[DecoderConfig], Names] = lambda config: {}
    name: str = ""  # its file's; the loader sets it
    #: Hugging Face's name of a tensor → that in another layout in which such models are published,
    #: and their configuration by the shapes of its tensors and the file's name, if they are such
    layout: Callable[[str], str] | None = None
    sizes: Callable[[Mapping[str, tuple[int, ...]], str], dict[str, Any] | None] | None = None
    #: tensors that repeat the embedding, where a checkpoint has them
    copies: tuple[str, ...] = ()
    #: whether the head is the embedding, its tensor says and not the configuration
    ties_by_tensors: bool = False
    #: the source's module → how it holds ours, where that is not one tensor as we have it
    folds: Mapping[str, Fold] = field(default_factory=dict)

    # --- names ---

    def hf_name(self, name: str) -> str:
        """blocks.3.attention.q.weight → model.layers.3.self_attn.q_proj.weight."""
        return _place(name, self.names, 0)[0]

    def gguf_name(self, name: str) -> str:
        """blocks.3.attention.q.weight → blk.3.attn_q.weight."""
        return _place(name, self.names, 1)[0]

    def knows(self, name: str) -> bool:
        """Whether such a tensor of ours can be in a model of the family."""
        return _template(name)[0] in self.names

    def hf_tensor(self, name: str, config: DecoderConfig) -> SourceTensor:
        """The tensor of a Hugging Face folder that holds ours."""
        return self._tensor(name, config, 0)

    def gguf_tensor(self, name: str, config: DecoderConfig) -> SourceTensor:
        """The tensor of a GGUF file that holds ours."""
        return self._tensor(name, config, 1)

    def _tensor(self, name: str, config: DecoderConfig, side: int) -> SourceTensor:
        if name == "score.weight":  # a classifier's, under this name everywhere
            return SourceTensor(name, (name,), None)
        source, template, numbers = _place(name, ChainMap(self.renamed(config), self.names), side)
        fold = self.folds.get(template)
        if fold is None:
            return SourceTensor(source, (name,), None)
        leaf = name.rpartition(".")[2]
        parts = [
            part.replace("{n}", numbers.get("n", "")).replace("{e}", str(expert))
            for part in fold.parts
            for expert in (range(config.experts) if "{e}" in part else (0,))
        ]
        return SourceTensor(source, tuple(f"{part}.{leaf}" for part in parts), fold)

    # --- configuration ---

    def config(self, source: dict[str, Any], where: str) -> DecoderConfig:
        keys = Keys(source, where)
        config = self.read(keys)
        keys.finish()
        return config

    def source(self, config: DecoderConfig) -> dict[str, Any]:
        """A config.json's content for these axes."""
        known = {"architectures": [self.architecture], "model_type": self.model_type}
        return known | self.write(config)


def _template(name: str) -> tuple[str, dict[str, str]]:
    """blocks.3.mlp.experts.5.up.weight → blocks.{n}.mlp.experts.{e}.up, {n: 3, e: 5}."""
    numbers: dict[str, str] = {}

    def note(match: re.Match[str]) -> str:
        key = "n" if match[1] == "blocks" else "e"
        numbers[key] = match[2]
        return f"{match[1]}.{{{key}}}"

    module = name.rpartition(".")[0]
    return re.sub(r"\b(blocks|experts)\.(\d+)", note, module), numbers


def _place(
    name: str, table: Mapping[str, tuple[str, str]], side: int
) -> tuple[str, str, dict[str, str]]:
    """The source's name of our tensor, the table's entry for its module, and layer and expert."""
    module, _, leaf = name.rpartition(".")
    row, numbers = (module, {}) if module in table else _template(name)
    found = template = table[row][side]
    for key, number in numbers.items():
        found = found.replace(f"{{{key}}}", number)
    return (found[:-1] if found.endswith("=") else f"{found}.{leaf}"), template, numbers
