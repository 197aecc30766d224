"""What a family is: how a source's configuration and tensor names become the decoder's, and back.

A description (one short file in families/) is:

- `names`: one table, ours → (Hugging Face's, GGUF's), used to load and to save. `{n}` is the layer.
  A row names a module; its tensors are `.weight` and, where the axes ask for it, `.bias`. A source's
  name that ends in = is that of the tensor itself.
- `folds`: where a source packs several of ours into one tensor, or keeps one in another order.
- `read` and `write`: the source's configuration → axes, and axes → the keys Hugging Face uses.
  GGUF's metadata is first put under Hugging Face's keys (`GGUF_KEYS`), so that there is one reading.

A key that this reading does not know is refused when it is set: an ignored key may be a model that
computes something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from herdbook.errors import FamilyError
from herdbook.model.config import DecoderConfig, RopeScaling
from herdbook.model.folds import K_ROTATING, Q_ROTATING, Fold
from herdbook.model.layers import rope_divisors, rope_frequencies

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

#: Hugging Face's key → GGUF's, without the architecture in front
GGUF_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "sliding_window": "attention.sliding_window",
}

#: keys of a Hugging Face config that do not change what the model computes
HARMLESS = re.compile(
    r"_.*|architectures|model_type|(torch_)?dtype|transformers(_|\.).*|.*_token_id|.*dropout.*"
    r"|.*_version|initializer_range|use_cache|pretraining_tp|id2label|label2id|problem_type"
    r"|return_dict.*|output_(hidden_states|attentions|scores)|chunk_size_feed_forward|auto_map"
    r"|is_llama_config|task_specific_params|name_or_path|max_sequence_length|bos_token|eos_token"
    r"|.*_pdrop|layerdrop|summary_.*|tokenizer_class|gradient_checkpointing|n_ctx|init_std|prefix"
    r"|custom_pipelines"
)


class Keys:
    """A source's configuration that remembers which keys were read, so that none is overlooked."""

    def __init__(self, source: dict[str, Any], where: str) -> None:
        self.source, self.where, self.taken = source, where, set[str]()

    def take(self, key: str, default: Any = None) -> Any:
        """The value; `default` where the key is missing or null."""
        self.taken.add(key)
        value = self.source.get(key)
        return default if value is None else value

    def refuse(self, what: str, rule: str) -> FamilyError:
        return FamilyError(
            f"{self.where}: {what}",
            rule=rule,
            next="check config.json against the original's, or use another model",
        )

    def number(self, key: str, default: int | None = None) -> int:
        """A size: a whole number of at least 1."""
        value = self.take(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.refuse(f"{key} is {value!r}", "but must be a whole number of at least 1")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise self.refuse(f"{key} is {value!r}", "but must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        if type(value) is not bool:
            raise self.refuse(f"{key} is {value!r}", "but must be true or false")
        return value

    def choice(self, key: str, known: dict[str, Any], default: str | None = None) -> Any:
        value = self.take(key, default)
        if value not in known:
            raise self.refuse(f"{key} is {value!r}", f"known are: {', '.join(known)}")
        return known[value]

    def either(self, *names: str) -> str:
        """Which of a key's names the source uses; the first where it uses none."""
        self.taken |= set(names)
        return next((name for name in names if self.source.get(name) is not None), names[0])

    def head_dim(self, hidden: int, heads: int) -> int:
        """The size of a head where hidden is divided among them."""
        if hidden % (2 * heads):
            raise self.refuse(f"{heads} heads", f"do not divide {hidden} into even numbers")
        return hidden // heads

    def only(self, key: str, value: Any) -> None:
        """Refuse the key where it is set to anything but `value`."""
        if self.take(key, value) != value:
            raise self.refuse(f"{key} is {self.take(key)!r}", f"but Herdbook knows only {value!r}")

    def finish(self) -> None:
        """Refuse what was not read and could change the result."""
        for key, value in self.source.items():
            if key in self.taken or HARMLESS.fullmatch(key) or value in (None, False, "", [], {}):
                continue
            raise FamilyError(
                f"{self.where}: the key {key!r} ({value!r})",
                rule="is unknown, and Herdbook does not guess whether it changes the result",
                next="remove it from config.json if it does not, else use another model",
            )


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def activation_name(config: DecoderConfig) -> str:
    """Hugging Face's name of the activation."""
    return next(hf for hf, ours in ACTIVATIONS.items() if ours == config.activation)


def need_activation(config: DecoderConfig, known: str) -> None:
    """GGUF has no key for it: llama.cpp takes the architecture's own (and computes any GELU by tanh)."""
    if config.activation != known:
        raise FamilyError(
            f"a model with the activation {config.activation}",
            rule=f"cannot be written as GGUF: there the architecture's is always {known}",
            next="export it as a Hugging Face folder (--to hf)",
        )


def read_llama(keys: Keys, **axes: Any) -> DecoderConfig:
    """The keys that every LLaMA-shaped family shares; `axes` are the family's own."""
    heads, hidden = keys.number("num_attention_heads"), keys.number("hidden_size")
    kv_heads = keys.number("num_key_value_heads", heads)
    if heads % kv_heads:
        raise keys.refuse(f"{heads} heads", f"do not divide among {kv_heads} key/value heads")
    head_dim = keys.number("head_dim", axes.pop("head_dim", None) or hidden // heads)
    if head_dim % 2:
        raise keys.refuse(f"head_dim is {head_dim}", "but a rotation turns pairs")
    max_pos = keys.number("max_position_embeddings", 2048)
    rope_base, scaling = read_rope(keys, max_pos)
    layers = keys.number("num_hidden_layers")
    return DecoderConfig(
        vocab=keys.number("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=keys.number("intermediate_size"),
        max_pos=max_pos,
        eps=keys.real("rms_norm_eps", 1e-6),
        rope_base=rope_base,
        rope_scaling=scaling,
        activation=keys.choice("hidden_act", ACTIVATIONS, "silu"),
        tied=keys.flag("tie_word_embeddings", False),
        **axes,
    )


def read_rope(keys: Keys, max_pos: int) -> tuple[float, RopeScaling | None]:
    """rope_theta and rope_scaling, or rope_parameters that holds both (transformers 5)."""
    source = keys.take("rope_parameters") or keys.take("rope_scaling") or {}
    keys.taken |= {"rope_parameters", "rope_scaling"}
    if not isinstance(source, dict):
        raise keys.refuse(f"rope_scaling is {source!r}", "but must be a mapping")
    rope = Keys(source, f"{keys.where} rope_scaling")
    top = keys.real("rope_theta", 10_000.0)
    base = rope.real("rope_theta", top)
    kind = rope.take("rope_type", rope.take("type", "default"))
    rope.taken.add("type")
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", rope.real("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            rope.real("factor"),
            rope.number("original_max_position_embeddings", max_pos),
            low=rope.real("low_freq_factor"),
            high=rope.real("high_freq_factor"),
        )
    elif kind == "yarn":
        factor = rope.real("factor")
        scaling = RopeScaling(
            "yarn",
            factor,
            rope.number("original_max_position_embeddings", max_pos),
            low=rope.real("beta_slow", 1.0),
            high=rope.real("beta_fast", 32.0),
            attention=rope.real("attention_factor", 0.1 * math.log(max(factor, 1.0)) + 1.0),
            truncate=rope.flag("truncate", True),
        )
    elif kind != "default":
        raise keys.refuse(f"rope_type is {kind!r}", "known are: default, linear, llama3, yarn")
    if float(rope.take("partial_rotary_factor", 1.0)) != 1.0:
        raise rope.refuse("partial_rotary_factor is set", "but this family turns whole heads")
    rope.finish()
    return base, scaling


def write_rope_scaling(config: DecoderConfig) -> dict[str, Any] | None:
    """What read_rope reads, but for the base."""
    s = config.rope_scaling
    if s is None:
        return None
    scaling: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        scaling["original_max_position_embeddings"] = s.original_max_pos
    if s.kind == "llama3":
        scaling |= {"low_freq_factor": s.low, "high_freq_factor": s.high}
    if s.kind == "yarn":
        scaling |= {"beta_slow": s.low, "beta_fast": s.high, "truncate": s.truncate}
        scaling["attention_factor"] = s.attention
    return scaling


def write_llama(config: DecoderConfig) -> dict[str, Any]:
    """The axes under Hugging Face's keys, as read_llama reads them."""
    c = config
    return {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": activation_name(c),
        "max_position_embeddings": c.max_pos,
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope_base,
        "rope_scaling": write_rope_scaling(c),
        "tie_word_embeddings": c.tied,
    }


def read_windows(keys: Keys) -> tuple[int | None, ...]:
    """Qwen's: a window from layer max_window_layers on, or as layer_types says."""
    layers = keys.number("num_hidden_layers")
    window, used = keys.take("sliding_window"), keys.flag("use_sliding_window")
    first, types = keys.take("max_window_layers", 28), keys.take("layer_types")
    if not used or window is None:
        if types and set(types) != {"full_attention"}:
            raise keys.refuse(f"layer_types is {types}", "but no sliding window is in use")
        return ()
    known = {"full_attention": None, "sliding_attention": keys.number("sliding_window")}
    if types is None:
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if len(types) != layers or not set(types) <= set(known):
        raise keys.refuse(f"layer_types is {types}", f"must be {layers} of {', '.join(known)}")
    return tuple(known[one] for one in types)


def write_windows(config: DecoderConfig) -> dict[str, Any]:
    """What read_windows reads."""
    sizes = {w for w in config.windows if w is not None}
    if not sizes:
        return {"use_sliding_window": False}
    assert len(sizes) == 1, "the layers' windows differ in size"
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return {
        "use_sliding_window": True,
        "sliding_window": sizes.pop(),
        "layer_types": kinds,
        "max_window_layers": kinds.index("sliding_attention"),
    }


# --- GGUF: metadata ----------------------------------------------------------------


def _short(value: Any) -> Any:
    """A float32's shortest decimal: 9.999999747378752e-06 is what 1e-05 became."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def source_from_gguf(
    metadata: dict[str, Any], family: Family, vocab: int, has: Callable[[str], bool], where: str
) -> dict[str, Any]:
    """GGUF's metadata under Hugging Face's keys. has(our name): whether such a tensor is there."""
    prefix = family.gguf + "."
    found = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    keys = Keys(found, where)
    source = {hf: _short(keys.take(ours)) for hf, ours in family.gguf_keys.items()}
    source = {hf: value for hf, value in source.items() if value is not None}
    source |= {"vocab_size": vocab, "tie_word_embeddings": not has("head.weight")}
    family.read_gguf(keys, source, has)
    keys.finish()
    for name in ("bos", "eos", "padding"):
        id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None:
            source[f"{'pad' if name == 'padding' else name}_token_id"] = id
    return source


def read_gguf_llama(keys: Keys, source: dict[str, Any], has: Callable[[str], bool]) -> None:
    """What LLaMA-shaped families say beyond the table: biases, widths, rotary scaling."""
    if isinstance(source.get("num_key_value_heads"), list):
        raise keys.refuse("the layers have different numbers of heads", "this is not supported")
    if has("blocks.0.attention.q.bias"):
        source["attention_bias"] = True
    if has("blocks.0.mlp.gate.bias"):
        source["mlp_bias"] = True

    heads = source.get("num_attention_heads", 1)
    width = source.get("head_dim") or source.get("hidden_size", 0) // heads
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.take(key, width) != width:
            raise keys.refuse(f"{key} is {keys.take(key)}", f"but a head has {width} dimensions")
    if keys.take("expert_count", 0):
        raise keys.refuse("it has experts", "mixtures of experts are not supported yet")
    kind, factor = keys.take("rope.scaling.type", "none"), keys.take("rope.scaling.factor", 1.0)
    if kind in ("linear", "yarn") and factor != 1.0:
        source["rope_scaling"] = {"rope_type": kind, "factor": _short(factor)}
        if kind == "yarn":
            original = keys.take("rope.scaling.original_context_length")
            source["rope_scaling"]["original_max_position_embeddings"] = original
    elif kind not in ("none", "linear", "yarn"):
        raise keys.refuse(f"rope.scaling.type is {kind!r}", "known are: none, linear, yarn")
    keys.taken |= {"rope.scaling.finetuned", "rope.scaling.original_context_length"}
    keys.taken |= {"expert_used_count", "tensor_data_layout"}


def gguf_metadata(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The axes as GGUF's metadata, under the family's architecture."""
    source = {hf: value for hf, value in family.write(config).items() if value is not None}
    known = {gguf: source[hf] for hf, gguf in family.gguf_keys.items() if hf in source}
    known |= family.write_gguf(config, source)
    return {f"{family.gguf}.{key}": value for key, value in known.items()}


def write_gguf_llama(config: DecoderConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The inverse of read_gguf_llama. source: the configuration under Hugging Face's keys."""
    metadata: dict[str, Any] = {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }
    scaling = config.rope_scaling
    differs = len(set(config.windows)) > 1 or (config.windows and "sliding_window" not in source)
    plain_yarn = scaling is None or scaling.kind != "yarn" or scaling == _yarn(scaling)
    if config.activation != "silu" or differs or not plain_yarn:
        raise FamilyError(
            f"a model with {config.activation}, windows {config.windows} and {scaling}",
            rule="cannot be written as GGUF: the format has no keys for it",
            next="export it as a Hugging Face folder (--to hf)",
        )
    if scaling is not None and scaling.kind != "llama3":  # llama3 goes as the tensor rope_freqs
        metadata |= {"rope.scaling.type": scaling.kind}
        metadata |= {"rope.scaling.factor": float(scaling.factor)}
        if scaling.original_max_pos:
            metadata["rope.scaling.original_context_length"] = scaling.original_max_pos
    return metadata


def _yarn(s: RopeScaling) -> RopeScaling:
    """The yarn that GGUF's keys can say: factor and original context, the paper's other numbers."""
    return RopeScaling(
        "yarn", s.factor, s.original_max_pos, 1.0, 32.0, 0.1 * math.log(max(s.factor, 1.0)) + 1.0
    )


def llama3_from_divisors(divisors: torch.Tensor, config: DecoderConfig) -> RopeScaling | None:
    """LLaMA 3's scaling, recognised in the divisors that GGUF keeps as `rope_freqs.weight`.

    The greatest divisor is the factor; a frequency between tells the original context, since Meta's
    low and high (1 and 4) are the same in all its models. None when the divisors are something else.
    """
    factor = round(float(divisors.max()), 4)
    plain = rope_frequencies(config)
    between = (divisors > 1) & (divisors < divisors.max())
    if factor <= 1 or not between.any():
        return None
    i = int(between.nonzero()[0])
    kept = (1 / float(divisors[i]) - 1 / factor) / (1 - 1 / factor)
    original = round((1 + kept * 3) * 2 * math.pi / float(plain[i]))
    scaling = RopeScaling("llama3", factor, original, 1.0, 4.0)
    same = torch.allclose(rope_divisors(plain, scaling, config), divisors, rtol=1e-3)
    return scaling if same else None


# --- the description ---


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

    def hf_tensor(self, name: str, config: DecoderConfig) -> SourceTensor:
        """The tensor of a Hugging Face folder that holds ours."""
        return self._tensor(name, config, 0)

    def gguf_tensor(self, name: str, config: DecoderConfig) -> SourceTensor:
        """The tensor of a GGUF file that holds ours."""
        return self._tensor(name, config, 1)

    def _tensor(self, name: str, config: DecoderConfig, side: int) -> SourceTensor:
        source, template, numbers = _place(name, self.names | self.renamed(config), side)
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


def _place(name: str, table: Names, side: int) -> tuple[str, str, dict[str, str]]:
    """The source's name of our tensor, the table's entry for its module, and layer and expert."""
    module, _, leaf = name.rpartition(".")
    numbers: dict[str, str] = {}

    def note(match: re.Match[str]) -> str:
        key = "n" if match[1] == "blocks" else "e"
        numbers[key] = match[2]
        return f"{match[1]}.{{{key}}}"

    row = module if module in table else re.sub(r"\b(blocks|experts)\.(\d+)", note, module)
    template = table[row][side]
    found = template
    for key, number in numbers.items():
        found = found.replace(f"{{{key}}}", number)
    name = found[:-1] if found.endswith("=") else f"{found}.{leaf}"
    return name, template, numbers
