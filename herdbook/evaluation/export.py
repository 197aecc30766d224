"""Write a model for other tools, and check before it is called done that it still says the same.

What is written appears under its name only after the check: token ids equal, logits as near as the
format allows. The original is never touched.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from herdbook.book.book import Artifact, Book
from herdbook.engine.loaded import LoadedModel, load
from herdbook.errors import ConfigError, FileError, UnknownName, nearest
from herdbook.files.atomic import sha256_file, sync_tree
from herdbook.model.checkpoint import save_gguf, save_hf
from herdbook.model.references import resolve

#: the probe text: both languages, numbers, code and blanks
PROBE = (
    "The herd book lists every animal with its parents.\n"
    "牧群登记簿记录每一头牲畜的父母。\n"
    "def parents(animal):\n    return book[animal].parents  # 2 of them, 1871–2026\n"
)
#: formats that keep the weights, and the largest difference of logits that they may bring
EXACT = {"F32": 1e-3, "F16": 0.25, "BF16": 2.0}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1")


def export(
    ref: str,
    path: Path,
    *,
    to: Literal["hf", "gguf", "peft"],
    quant: str = "",
    book: Book,
) -> dict[str, Any]:
    """Write `ref` to `path`; what the check found.

    to: hf (a folder that transformers loads), gguf (a file that llama.cpp loads; quant: its format),
    peft (the adapter that the model was tuned with).
    """
    path = Path(path).expanduser()
    if path.exists():
        raise ConfigError(f"{path}", rule="is there already", next="give a path that is not")
    if quant and to != "gguf":
        raise ConfigError(f"--quant {quant}", rule="belongs to --to gguf", next="leave it out")
    if quant and quant not in (*EXACT, *QUANTISED):
        known = (*EXACT, *QUANTISED)
        raise ConfigError(f"--quant {quant}", rule="is not known", next=nearest(quant, known))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        if to == "peft":
            found = _peft(ref, temporary, book)
        elif to == "hf":
            found = _hf(ref, temporary, book)
        else:
            found = _gguf(ref, temporary, quant, book)
        if temporary.is_dir():
            sync_tree(temporary)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
    return found


def _peft(ref: str, target: Path, book: Book) -> dict[str, Any]:
    adapter = next((a for a in book.ancestors(book.get(ref)) if a.kind == "adapter"), None)
    if adapter is None:
        raise UnknownName(
            f"{ref!r}", rule="has no adapter among its ancestors", next=f"herd tree {ref}"
        )
    names = ("adapter_config.json", "adapter_model.safetensors")
    target.mkdir()
    for name in names:
        shutil.copyfile(adapter.path / name, target / name)
        if sha256_file(target / name) != adapter.files[name]:
            raise FileError(f"{adapter.path / name}", rule="was changed", next="herd verify")
    return {"adapter": adapter.ref, "base": book.parents(adapter)[0].ref, "equal_files": len(names)}


def _hf(ref: str, target: Path, book: Book) -> dict[str, Any]:
    original = load(ref, book=book, dtype="float32", quantised=False)
    save_hf(original.decoder, original.maybe_tokenizer, target, torch.float32)
    return _compare(original, target, EXACT["F32"])


def _gguf(ref: str, target: Path, quant: str, book: Book) -> dict[str, Any]:
    source = resolve(ref, book)
    file = source if source.suffix == ".gguf" else source / "model.gguf"
    if file.is_file() and not quant:
        shutil.copyfile(file, target)
        if sha256_file(target) != sha256_file(file):
            raise FileError(f"{file}", rule="was not copied byte by byte", next="try again")
        return {"format": "as it is", "equal_bytes": target.stat().st_size}
    if file.is_file() and quant in QUANTISED:
        raise ConfigError(
            f"{ref} is quantised already",
            rule="and to quantise it again would add the errors of both",
            next=f"leave --quant out, or export {_unquantised(ref, book)} instead",
        )
    quant = quant or "F16"
    original = load(ref, book=book, dtype="float32", quantised=False)
    save_gguf(original.decoder, original.tokenizer, target, quant)
    return {"format": quant, **_compare(original, target, EXACT.get(quant))}


def _unquantised(ref: str, book: Book) -> str:
    """The model that a quantised one of the book was made from."""
    artifact: Artifact | None = book.find(ref)
    models = [one for one in book.parents(artifact) if one.kind == "model"] if artifact else []
    return models[0].ref if models else "the model that it was made from"


def _compare(original: LoadedModel, written: Path, bound: float | None) -> dict[str, Any]:
    """Load what was written and hold it against the original. bound: None only reports."""
    copy = load(str(written), dtype="float32", quantised=False)
    found: dict[str, Any] = {}
    if original.maybe_tokenizer is None:
        ids = [one % original.config.vocab for one in range(1, 60)]
        found["token_ids"] = "not compared: no tokenizer"
    else:
        ids = original.tokenizer.encode(PROBE)
        if copy.tokenizer.encode(PROBE) != ids:
            raise FileError(f"{written.name}", rule="gives other token ids than the original")
        found["token_ids"] = "equal"
    if original.decoder.headless:
        a, b = original.hidden(ids), copy.hidden(ids)
    else:
        a, b = original.logits(ids), copy.logits(ids)
    difference = (a - b).abs().max().item()
    found["max_logit_difference"] = difference
    found["top1_agreement_share"] = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    if bound is not None and difference > bound:
        raise FileError(
            f"{written.name} gives logits that differ by {difference:.3g}",
            rule=f"from the original, more than the {bound:g} its format explains",
            next="try --quant F32; if that differs too, please report it",
        )
    return found
