"""The step that brings a model from outside into the book."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from herdbook.book.hashing import digest
from herdbook.book.step import Bench, Step
from herdbook.files.atomic import sha256_once, write_text
from herdbook.model.checkpoint import (
    INDEX,
    LEGACY_INDEX,
    PARAMS,
    Checkpoint,
    check_vocabulary,
    expected_shapes,
    open_checkpoint,
)
from herdbook.model.references import SMOLLM2_SHA256, resolve
from herdbook.tokens import reading, rwkv, templates
from herdbook.tokens.reading import files as other_files
from herdbook.tokens.settings import TEMPLATE
from herdbook.tokens.tokenizer import Tokenizer

#: what lies beside the weights and belongs to the model
BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE,
    "chat_template.json",
    INDEX,
    LEGACY_INDEX,
    PARAMS,
    "LICENSE",
    "LICENSE.txt",
)


def files_of(checkpoint: Checkpoint) -> dict[str, Path]:
    """Name in the book → file, of everything that makes up the model."""
    if checkpoint.path.suffix == ".gguf" and checkpoint.path.is_file():
        return {"model.gguf": checkpoint.path}
    if (weights := rwkv.weights(checkpoint.path)) is not None:
        tokenizer = rwkv.file(weights)
        return {weights.name: weights, tokenizer.name: tokenizer}
    found = {path.name: path for path in checkpoint.weights.files}
    beside = {name: checkpoint.path / name for name in BESIDE}
    beside |= {path.name: path for path in other_files(checkpoint.path)}
    return found | {name: path for name, path in beside.items() if path.is_file()}


@dataclass(frozen=True)
class Fetch(Step):
    """Bring a model into the book: the embedded one, a folder, a .gguf file or one from the hub.

    Its headers, names and shapes, and its tokenizer's size, are checked before it is entered.
    """

    kind: ClassVar[str] = "model"
    ref: str = "smollm2"
    #: a chat template in place of the model's own: a file, or a name (see: herd templates)
    template: str = ""

    def check(self) -> None:
        if self.template:
            templates.read(self.template)

    def called(self) -> str | None:
        """A base model is known by its own name, whatever it is raised to.

        smollm2 → smollm2, hf:org/Name-1.7B → name-1.7b, folder/My Model → my-model, luna.gguf → luna
        """
        if self.ref.startswith("hf:") or not (path := Path(self.ref).expanduser()).exists():
            own = self.ref.removeprefix("hf:").rpartition("/")[2]
        else:
            own = path.absolute().name.removesuffix(".gguf").removesuffix(".pth")
        return re.sub(r"[^a-z0-9._-]+", "-", own.lower()).strip("-._") or None

    def fingerprint(self) -> dict[str, str]:
        chosen = {TEMPLATE: digest(templates.read(self.template))} if self.template else {}
        if self.ref == "smollm2" and not Path(self.ref).exists():
            return {"model.gguf": f"sha256:{SMOLLM2_SHA256}"} | chosen
        if not Path(self.ref).expanduser().exists():
            return chosen  # from the hub: known by its name
        checkpoint = open_checkpoint(resolve(self.ref, None))
        files = files_of(checkpoint)
        if not chosen and Tokenizer.exists(
            checkpoint.path
        ):  # it may be one that only the name tells
            chosen = {"chat template": digest(reading.template(checkpoint.path))}
        return {name: sha256_once(path) for name, path in sorted(files.items())} | chosen

    def make(self, bench: Bench) -> dict[str, Any]:
        checkpoint = open_checkpoint(resolve(self.ref, None, bench.progress))
        chosen = templates.read(self.template) if self.template else None
        template = None
        if Tokenizer.exists(checkpoint.path):
            tokenizer = Tokenizer.load(checkpoint.path, chosen)
            check_vocabulary(checkpoint.config, tokenizer.size)
            template = tokenizer.chat_template
        files = files_of(checkpoint)
        size = sum(path.stat().st_size for path in files.values())
        with bench.progress.task("copy", total=size, unit="bytes") as task:
            for name, path in files.items():
                shutil.copyfile(path, bench.out / name)
                task.advance(path.stat().st_size)
        if template is not None and template in (chosen, *map(templates.read, templates.shipped())):
            # found by a name that the book will not keep
            write_text(bench.out / TEMPLATE, template)
        shapes = expected_shapes(checkpoint.config, headless=checkpoint.headless)
        return {
            "family": checkpoint.family.model_type,
            "parameters": sum(map(math.prod, shapes.values())),
            "size_bytes": size,
            "vocabulary": checkpoint.config.vocab,
            "layers": checkpoint.config.layers,
        }
