"""Meta's own layout of LLaMA: params.json and consolidated.00.pth, one file a machine of the cluster.

Each machine holds a part of every matrix: rows of those that go first in a pair (wq, wk, wv, w1, w3,
output), columns of those that go second (wo, w2), of the embedding columns (LLaMA 1 and 2) or rows
(3). The norms are whole in each. q and k have their rows in the order of interleaved rotation.

params.json leaves out what Meta's code has as defaults or finds in the weights.
    LLaMA 7B: {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06,
               "vocab_size": -1}
Source: https://github.com/meta-llama/llama-models
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from herdbook.errors import FileError
from herdbook.files.foreign import read_json
from herdbook.files.pickles import read_table
from herdbook.model.checkpoint.base import Checkpoint, check_shapes, expected_shapes
from herdbook.model.checkpoint.weights import Part, PlainWeights
from herdbook.model.families import families
from herdbook.model.family import SourceTensor
from herdbook.model.folds import K_ROTATING, Q_ROTATING, Fold
from herdbook.model.keys import Keys
from herdbook.model.sources import check_sizes, read_config, source_shapes

PARAMS = "params.json"
SHARDS = "consolidated.*.pth"

MODULES = {
    "embed": "tok_embeddings",
    "norm": "norm",
    "head": "output",
    "attention_norm": "attention_norm",
    "attention.q": "attention.wq",
    "attention.k": "attention.wk",
    "attention.v": "attention.wv",
    "attention.o": "attention.wo",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.down": "feed_forward.w2",
    "mlp.up": "feed_forward.w3",
}
#: the axis along which a matrix is parted; a norm has none, the embedding shows it by its shape
AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}


def is_meta(folder: Path) -> bool:
    return (folder / PARAMS).is_file() and any(folder.glob(SHARDS))


def open_meta(folder: Path) -> Checkpoint:
    where = folder / PARAMS
    params = read_json(where)
    shards = sorted(folder.glob(SHARDS))
    tables = [read_table(shard) for shard in shards]
    for shard, table in zip(shards, tables, strict=True):
        if table.keys() != tables[0].keys():
            raise FileError(
                f"{shard} holds other tensors than {shards[0].name}",
                rule="but each of Meta's files holds a part of every tensor",
                next="fetch the files again, all of one model",
            )
    parts = {
        name: [Part(path, one[name]) for path, one in zip(shards, tables, strict=True)]
        for name in tables[0]
    }
    axes = {}
    for name, some in parts.items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        shape = some[0].entry.shape
        if module == "tok_embeddings" and len(shape) == 2:
            axes[name] = 0 if shape[1] == params.get("dim") else 1
        elif module in AXES and len(shape) == 2:
            axes[name] = AXES[module]
        if any(
            part.entry.shape != shape or part.entry.dtype != some[0].entry.dtype for part in some
        ):
            raise FileError(
                f"{folder}: tensor {name!r} has not the same shape and type in all files",
                rule="but the machines have equal parts",
                next="fetch the files again, all of one model",
            )
    weights = PlainWeights(parts, axes)
    family = families()["llama"]
    source = _source(params, weights.shapes, str(where))
    config = read_config(family, source, str(where))
    check_sizes(folder, config, weights.shapes)
    expected = expected_shapes(config)
    names = {name: SourceTensor(meta_name(name), (name,), _fold(name)) for name in expected}
    check_shapes(folder, source_shapes(expected, names), weights, weights.shapes)
    return Checkpoint(folder, family, config, source, False, names, expected, weights)


def _fold(name: str) -> Fold | None:
    """q and k have their rotating rows as pairs side by side."""
    for end, order in (("attention.q.weight", Q_ROTATING), ("attention.k.weight", K_ROTATING)):
        if name.endswith(end):
            return Fold((name,), order)
    return None


def meta_name(name: str) -> str:
    """blocks.3.attention.q.weight → layers.3.attention.wq.weight."""
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name):
        return f"layers.{block[1]}.{MODULES[block[2]]}.weight"
    return f"{MODULES[name.removesuffix('.weight')]}.weight"


def _source(
    params: dict[str, Any], shapes: dict[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """params.json under Hugging Face's keys."""
    keys = Keys(params, where)
    hidden, heads = keys.number("dim"), keys.number("n_heads")
    base, eps = keys.real("rope_theta", 10_000.0), keys.real("norm_eps", 1e-5)
    multiple = keys.number("multiple_of", 256)
    ffn = int(keys.real("ffn_dim_multiplier", 1.0) * (8 * hidden // 3))
    embedding = shapes.get("tok_embeddings.weight", (0,))
    keys.taken |= {"vocab_size", "max_seq_len", "max_batch_size"}  # -1 or as the embedding has it
    source: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "intermediate_size": -(-ffn // multiple) * multiple,
        "num_hidden_layers": keys.number("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("n_kv_heads", heads),
        "rms_norm_eps": eps,
        "rope_theta": base,
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if keys.flag("use_scaled_rope"):  # LLaMA 3.1 by 8; 3.2, which has narrower models, by 32
        factor = keys.real("rope_scaling_factor", 8.0 if hidden >= 4096 else 32.0)
        source["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        context = 131_072
    elif base > 10_000:  # LLaMA 3; Code Llama
        context = 8192 if base == 500_000 else 16_384
    else:  # LLaMA 2; 1
        context = 4096 if eps == 1e-5 else 2048
    keys.finish()
    return source | {"max_position_embeddings": context}
