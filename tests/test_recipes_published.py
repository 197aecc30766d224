"""Each recipe's full profile is what its authors published, and its cpu profile runs on a tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from herdbook import recipe
from herdbook.book.book import Book
from herdbook.book.step import Bench
from herdbook.compression import quantise as compression
from herdbook.data.plain import Text
from herdbook.engine.loading import load
from herdbook.evaluation import report as evaluation
from herdbook.model.init import Init
from herdbook.recipe import Recipe, raise_
from herdbook.tokens.train import TrainTokenizer
from herdbook.training.tune import Tune

ALPACA_LORA = {
    "method": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.05, "targets": ("q", "v"),
    "learning_rate": 3e-4, "warmup_steps": 100, "batch": 128, "epochs": 3, "length": 256,
}  # fmt: skip
ALPACA = {
    "method": "full", "batch": 128, "learning_rate": 2e-5, "epochs": 3, "length": 512,
    "weight_decay": 0.0, "warmup_ratio": 0.03, "schedule": "cosine",
}  # fmt: skip
CHATGLM = {
    "rank": 8, "alpha": 32.0, "dropout": 0.1, "targets": ("q", "k", "v"), "learning_rate": 5e-5,
    "schedule": "cosine", "batch": 16,
}  # fmt: skip
EVERY = ("q", "k", "v", "o", "gate", "up", "down")

#: recipe → step → its published settings
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "alpaca": {"tune": ALPACA},
    "expertllama": {"tune": ALPACA},
    "vicuna": {"tune": ALPACA | {"length": 2048}},
    "koala": {"tune": {"method": "full", "epochs": 2}},
    "dolly": {
        "tune": {"method": "full", "learning_rate": 5e-6, "epochs": 2, "batch": 48, "warmup_steps": 50}
    },
    "belle": {
        "tune": {"method": "full", "batch": 64, "learning_rate": 8e-6, "epochs": 2, "length": 1024}
    },
    "alpaca-lora": {"tune": ALPACA_LORA},
    "taoli": {"tune": ALPACA_LORA},
    "huatuo": {"tune": ALPACA_LORA | {"epochs": 10, "warmup_ratio": 0.1, "warmup_steps": 0}},
    "baize": {
        "tune": {
            "method": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.05, "batch": 64, "epochs": 1,
            "length": 512, "learning_rate": 2e-4, "warmup_steps": 100,
            "targets": ("q", "k", "v", "gate", "up", "down"),
        }
    },
    "gpt4all": {
        "tune": {
            "method": "lora", "rank": 8, "alpha": 32.0, "dropout": 0.1, "batch": 32, "epochs": 4,
            "learning_rate": 5e-5, "length": 1024, "warmup_steps": 100,
        }
    },
    "chatglm-ptuning": {
        "tune": {
            "method": "prefix", "virtual_tokens": 128, "learning_rate": 2e-2, "batch": 16,
            "steps": 3000, "length": 128,
        }
    },
    "chatglm-freeze": {
        "tune": {"method": "freeze", "parts": ("mlp",), "last_layers": 3, "epochs": 3, "batch": 16}
    },
    "chatglm-lora": {"tune": CHATGLM | {"method": "lora", "base": "dense", "epochs": 3}},
    "chatglm-qlora": {"tune": CHATGLM | {"method": "lora", "base": "nf4", "epochs": 1}},
    "llmtune": {
        "tune": {
            "method": "lora", "base": "packaged", "rank": 8, "alpha": 16.0, "dropout": 0.05,
            "batch": 2, "epochs": 3, "learning_rate": 2e-4, "length": 256, "warmup_steps": 50,
        }
    },
    "firefly": {
        "tune": {
            "method": "lora", "base": "nf4", "rank": 64, "alpha": 16.0, "dropout": 0.05, "clip": 0.3,
            "learning_rate": 2e-4, "schedule": "constant", "warmup_steps": 3000, "batch": 16,
            "length": 1024, "epochs": 1, "weight_decay": 0.0,
        }
    },
    "camel": {
        "read": ALPACA | {"epochs": 1, "length": 2048},
        "tune": ALPACA | {"length": 2048},
    },
    "lawgpt": {
        "read": {
            "method": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.05, "batch": 128, "epochs": 1,
            "learning_rate": 3e-4, "length": 1024, "targets": ("q", "k", "v", "o"),
        },
        "tune": ALPACA_LORA | {"batch": 64, "epochs": 20},
    },
    "cama": {
        "read": {"method": "full"},
        "tune": {
            "method": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.05, "batch": 128, "epochs": 3,
            "learning_rate": 3e-4, "length": 512, "warmup_steps": 10, "targets": EVERY,
        },
    },
    "llama": {
        "model": {"hidden": 4096, "layers": 32, "heads": 32, "ffn": 11008, "context": 2048},
        "tune": {
            "learning_rate": 3e-4, "schedule": "cosine", "floor": 0.1, "warmup_steps": 2000,
            "weight_decay": 0.1, "betas": (0.9, 0.95), "clip": 1.0, "batch": 2048, "length": 2048,
        },
    },
    "cerebras-gpt": {
        "first": {"hidden": 768, "layers": 10, "heads": 12},
        "second": {"hidden": 1088, "layers": 14, "heads": 17},
        "third": {"hidden": 1536, "layers": 18, "heads": 12},
        "small": {"tokens_per_parameter": 20.0, "batch": 120, "learning_rate": 6e-4, "length": 2048},
        "middle": {"tokens_per_parameter": 20.0, "batch": 264, "learning_rate": 6e-4},
        "large": {"tokens_per_parameter": 20.0, "batch": 264, "learning_rate": 2e-4},
    },
    "chinese-llama-alpaca": {
        "trained": {"size": 20_000},
        "read": {
            "rank": 8, "alpha": 32.0, "dropout": 0.05, "targets": (), "whole": ("embed", "head"),
            "learning_rate": 2e-4, "length": 512, "epochs": 1, "warmup_ratio": 0.05,
            "weight_decay": 0.01, "schedule": "cosine",
        },
        "tune": {"rank": 8, "alpha": 32.0, "learning_rate": 1e-4, "length": 512, "warmup_ratio": 0.03},
    },
    "billa": {
        "read": {"method": "full", "learning_rate": 3e-5, "steps": 100_000, "warmup_steps": 2000},
        "mixed": {"method": "full", "learning_rate": 2e-5, "steps": 20_000, "mix": (1.0, 1.0)},
        "tune": {"method": "full", "learning_rate": 2e-5, "steps": 20_000, "length": 1024},
    },
}  # fmt: skip
#: what needs a LLaMA with a SentencePiece tokenizer
WITH_PIECES = ("chinese-llama-alpaca", "billa")


def settings_of(name: str, **given: str) -> dict[str, str]:
    """Of `given` what the recipe takes."""
    return {key: value for key, value in given.items() if key in Recipe.read(name).settings}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_full_profile_is_the_published_one(name: str) -> None:
    described = Recipe.read(name)
    assert described.source.startswith("https://")
    steps = described.resolve(
        {"profile": "full", **settings_of(name, data="x", text="x", tasks="x", base="x")}
    )
    for step, published in PUBLISHED[name].items():
        assert {key: getattr(steps[step], key) for key in published} == published, step


def test_every_recipe_has_a_source_and_a_place_in_the_list() -> None:
    assert set(PUBLISHED) | {"cria"} == set(recipe.shipped())
    abouts = [Recipe.read(name).about for name in recipe.shipped()]
    assert all(len(about["en"]) <= 100 and len(about["zh"]) <= 60 for about in abouts)


@dataclass(frozen=True)
class Report(evaluation.Report):
    """Both models answer; nothing is measured."""

    def make(self, bench: Bench) -> dict[str, Any]:
        ids = [5, 6, 7]
        for side in ("before", "after"):
            assert load(str(bench.artifact(side).path)).logits(ids).isfinite().all()
        nothing = {"ref": "", "size_bytes": 1}
        report = {"before": nothing, "after": nothing, "perplexity": {}}
        (bench.out / "report.json").write_text(json.dumps(report))
        return {}


@dataclass(frozen=True)
class Quantise(compression.Quantise):
    """Eight bits are tested elsewhere, and nothing is trained beside them here: the model as it is."""

    def make(self, bench: Bench) -> dict[str, Any]:
        if self.format == "Q4_1":
            return super().make(bench)
        shutil.copytree(bench.artifact("model").path, bench.out, dirs_exist_ok=True)
        return {}


def _with_pieces(book: Book, text: Path) -> Path:
    """A LLaMA with a SentencePiece tokenizer that does not know the text's words."""
    other = text.with_name("other.txt")
    other.write_text("the quick brown fox jumps over a lazy dog\n" * 20)
    tokens = TrainTokenizer(text=(str(other),), size=300).run(book, name="few")
    made = Init(tokenizer=tokens.id, hidden=32, layers=2, heads=2, context=256).run(book)
    shutil.copytree(made.path, text.with_name("base"))
    return text.with_name("base")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_cpu_profile_runs(
    name: str, book: Book, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recipe.STEPS, "Report", __name__)
    monkeypatch.setitem(recipe.STEPS, "Quantise", __name__)
    rows = [{"instruction": f"who {'you ' * n}", "output": f"a model {n}"} for n in range(12)]
    data, text = tmp_path / "rows.jsonl", tmp_path / "notes.txt"
    data.write_text("\n".join(map(json.dumps, rows)))
    text.write_text("\n\n".join(f"hello {n} you are small model " * 20 for n in range(12)))
    base = _with_pieces(book, text) if name in WITH_PIECES else tiny_folder
    files = {"data": str(data), "tasks": str(data), "text": str(text)}
    given = settings_of(name, base=str(base), **files)
    small: dict[str, Any] = {}
    for step, made in Recipe.read(name).resolve(given).items():
        if isinstance(made, Tune):
            small |= {f"{step}.steps": 2, f"{step}.batch": 2, f"{step}.length": 192}
            small |= {f"{step}.rank": 2, f"{step}.virtual_tokens": 4}
            small |= {f"{step}.tokens_per_parameter": 0}
        if isinstance(made, Init):
            small |= {f"{step}.context": 192}
        if isinstance(made, Text):
            small |= {f"{step}.size": 200}
        if isinstance(made, TrainTokenizer):
            small |= {f"{step}.size": 270 if made.algorithm == "bytes" else 300}
    raised = raise_(name, book=book, **given, **small)
    assert raised.artifact.name == name
    assert not raise_(name, book=book, **given, **small).made
