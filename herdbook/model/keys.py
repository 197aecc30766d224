"""How a source's configuration is read, key by key, and written again: what families share.

A key that the reading does not know is refused when it is set: an ignored key may be a model that
computes something else.
"""

from __future__ import annotations

import math
import re
from typing import Any

from herdbook.errors import FamilyError
from herdbook.model.config import DecoderConfig, RopeScaling

#: keys of a Hugging Face config that do not change what the model computes
HARMLESS = re.compile(
    r"_.*|architectures|model_type|(torch_)?dtype|transformers(_|\.).*|.*_token_id|.*dropout.*"
    r"|.*_version|initializer_range|use_cache|pretraining_tp|id2label|label2id|problem_type"
    r"|return_dict.*|output_(hidden_states|attentions|scores)|chunk_size_feed_forward|auto_map"
    r"|is_llama_config|task_specific_params|name_or_path|max_sequence_length|bos_token|eos_token"
    r"|.*_pdrop|layerdrop|summary_.*|tokenizer_class|gradient_checkpointing|n_ctx|init_std|prefix"
    r"|attn_implementation|custom_pipelines"
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
        """A size: a whole number of at least 1; of layers, what a list of them may be made of."""
        value = self.take(key, default)
        if type(value) is not int or not 1 <= value < (10_000 if "layer" in key else 2**31):
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
    base = axes.pop("rope_base", 10_000.0)
    rope_base, scaling = read_rope(keys, max_pos, base, partial="rope_dim" in axes)
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
        eps=keys.real("rms_norm_eps", axes.pop("eps", 1e-6)),
        rope_base=rope_base,
        rope_scaling=scaling,
        activation=axes.pop("activation", None) or keys.choice("hidden_act", ACTIVATIONS, "silu"),
        tied=keys.flag("tie_word_embeddings", axes.pop("tied", False)),
        **axes,
    )


def read_rope(
    keys: Keys, max_pos: int, base: float = 10_000.0, *, partial: bool = False
) -> tuple[float, RopeScaling | None]:
    """rope_theta and rope_scaling, or rope_parameters that holds both (transformers 5).

    base: where the source names none. partial: that only a part of each head turns is the family's
    business, and read by it.
    """
    source = keys.take("rope_parameters") or keys.take("rope_scaling") or {}
    keys.taken |= {"rope_parameters", "rope_scaling"}
    if not isinstance(source, dict):
        raise keys.refuse(f"rope_scaling is {source!r}", "but must be a mapping")
    rope = Keys(source, f"{keys.where} rope_scaling")
    base = rope.real("rope_theta", keys.real("rope_theta", base))
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
    elif kind == "dynamic":
        scaling = RopeScaling("dynamic", rope.real("factor"))
    elif kind != "default":
        known = "known are: default, dynamic, linear, llama3, yarn"
        raise keys.refuse(f"rope_type is {kind!r}", known)
    if float(rope.take("partial_rotary_factor", 1.0)) != 1.0 and not partial:
        raise rope.refuse("partial_rotary_factor is set", "but this family turns whole heads")
    rope.finish()
    return base, scaling


def write_rope_scaling(config: DecoderConfig) -> dict[str, Any] | None:
    """What read_rope reads, but for the base."""
    s = config.rope_scaling
    if s is None:
        return None
    scaling: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("llama3", "yarn"):
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
