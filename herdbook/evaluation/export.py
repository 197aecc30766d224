"""Write a model for other tools, and check before it is called done that it still says the same.

What is written appears under its name only after the check: token ids equal, logits as near as the
format allows. The original is never touched.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from herdbook.book.book import Book
from herdbook.compression import parity
from herdbook.engine.loaded import LoadedModel
from herdbook.engine.loading import load
from herdbook.errors import ConfigError, FileError, GateError, UnknownName, nearest
from herdbook.files.atomic import sha256_file, sync_folder, sync_tree
from herdbook.model.checkpoint import open_checkpoint, save_gguf, save_hf
from herdbook.model.checkpoint.compressed import CompressedWeights
from herdbook.model.fetch import files_of
from herdbook.model.lora import adapters_of
from herdbook.model.references import resolve
from herdbook.training.peft_format import CONFIG, WEIGHTS

#: formats that keep the weights, and the difference of logits that their rounding explains, as a
#: share of the largest logit
EXACT = {"F32": 1e-4, "F16": 0.02, "BF16": 0.15}
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

    to: hf (a folder that transformers loads), gguf (a file that llama.cpp loads; quant: its format,
    default: as it is, else F16), peft (the adapter that the model was tuned with).
    """
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise ConfigError(f"{path}", rule="is there already", next="give a path that is not")
    if to == "gguf" and path.suffix != ".gguf":
        raise ConfigError(f"{path.name}", rule="does not end in .gguf", next=f"{path.name}.gguf")
    if quant and to != "gguf":
        raise ConfigError(f"--quant {quant}", rule="belongs to --to gguf", next="leave it out")
    if quant and quant not in (*EXACT, *QUANTISED):
        known = (*EXACT, *QUANTISED)
        raise ConfigError(f"--quant {quant}", rule="is not known", next=nearest(quant, known))
    desk = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    desk.mkdir(parents=True)
    written = desk / path.name  # under its final name: a GGUF tells its own
    try:
        if to == "peft":
            found = _peft(ref, written, book)
        elif to == "hf":
            found = _hf(ref, written, book)
        else:
            found = _gguf(ref, written, quant, book)
        sync_tree(desk)
        os.replace(written, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(desk)
    return found


def _peft(ref: str, target: Path, book: Book) -> dict[str, Any]:
    adapter = next((a for a in book.ancestors(book.get(ref)) if a.kind == "adapter"), None)
    if adapter is None:
        raise UnknownName(
            f"{ref!r}", rule="has no adapter among its ancestors", next=f"herd tree {ref}"
        )
    target.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(adapter.path / name, target / name)
        if sha256_file(target / name) != adapter.files[name]:
            raise FileError(f"{adapter.path / name}", rule="was changed", next="herd verify")
    base = next(one for one in book.parents(adapter) if one.kind == "model")
    found = {"adapter": adapter.ref, "base": base.ref}
    merged = (one for one in book.ancestors(book.get(ref)) if adapter.id in one.parents)
    model = next((one for one in merged if one.kind == "model"), None)
    if model is not None:  # what was written, on its base, says what the merged model says
        found |= _compare(_load(model.ref, book), target, EXACT["F32"], book)
    return found


def _hf(ref: str, target: Path, book: Book) -> dict[str, Any]:
    original = _load(ref, book)
    source = open_checkpoint(original.path)
    if _compressed(original.path):
        target.mkdir()
        for name, file in files_of(source).items():
            shutil.copyfile(file, target / name)
        return {"format": "as it is", **_compare(original, target, EXACT["F32"])}
    # each tensor goes back in the type that it came in
    save_hf(original.decoder, original.maybe_tokenizer, target, source.dtype)
    return _compare(original, target, EXACT["F32"])


def _gguf(ref: str, target: Path, quant: str, book: Book) -> dict[str, Any]:
    source = resolve(ref, book)
    file = source if source.suffix == ".gguf" else source / "model.gguf"
    if file.is_file() and not quant:
        shutil.copyfile(file, target)
        if sha256_file(target) != sha256_file(file):
            raise FileError(f"{file}", rule="was not copied byte by byte", next="try again")
        return {"format": "as it is", "size_bytes": target.stat().st_size, **_note(target)}
    original = None if file.is_file() else _load(ref, book)
    if quant in QUANTISED and (original is None or _compressed(original.path)):
        raise ConfigError(
            f"{ref} is quantised already",
            rule="and to quantise it again would add the errors of both",
            next=f"leave --quant out{_unquantised(ref, book)}",
        )
    quant = quant or "F16"
    original = original or _load(ref, book)
    save_gguf(original.decoder, original.tokenizer, target, quant)
    parity.check_written(original.decoder, target, quant)
    found = _compare(original, target, EXACT.get(quant))
    return {"format": quant, "size_bytes": target.stat().st_size, **found, **_note(target)}


def _note(file: Path) -> dict[str, str]:
    """What llama.cpp computes otherwise of a GGUF, where it does."""
    written = open_checkpoint(file)
    note = written.family.gguf_note(written.config)
    return {"note": note} if note else {}


def _compressed(path: Path) -> bool:
    """Whether a folder's matrices are quantised."""
    return isinstance(open_checkpoint(path).weights, CompressedWeights)


def _unquantised(ref: str, book: Book) -> str:
    """Advice to take the model that a quantised one of the book was made from."""
    artifact = book.find(ref)
    models = [one for one in book.parents(artifact) if one.kind == "model"] if artifact else []
    return f", or export {models[0].ref} instead" if models else ""


def _load(ref: str, book: Book) -> LoadedModel:
    """The model dequantised, in float32. An adapter that is not merged is none."""
    model = load(str(resolve(ref, book)), book=book, dtype="float32", quantised=False)
    if adapters_of(model.decoder):
        raise ConfigError(
            f"{ref} is an adapter on its base",
            rule="and other tools want one model",
            next="merge it first (step Merge)",
        )
    return model


def _compare(
    original: LoadedModel, written: Path, bound: float | None, book: Book | None = None
) -> dict[str, Any]:
    """Load what was written and hold it against the original. bound: None only reports. book: where
    the base of a written adapter is."""
    copy = load(str(written), book=book, dtype="float32", quantised=False)
    if original.maybe_tokenizer is None:
        ids = [one % original.config.vocab for one in range(64)]
    else:
        ids = original.tokenizer.encode(parity.TEXT)
        if copy.tokenizer.encode(parity.TEXT) != ids:
            raise GateError(
                f"{written.name} gives other token ids than {original.path.name}",
                next="please report this, with the name of the model",
            )
    headless = original.decoder.headless
    a, b = (one.hidden(ids) if headless else one.logits(ids) for one in (original, copy))
    found = parity.compare(a, b)
    if bound is not None and not found.max_logit_difference <= bound * found.scale:
        raise GateError(
            f"the logits of {written.name} differ by {found.max_logit_difference:.3g}",
            rule=f"more than the {bound * found.scale:.3g} that its format explains",
            next="try --quant F32; if that differs too, please report it",
        )
    return {
        "equal_token_ids": len(ids),
        "max_logit_difference": found.max_logit_difference,
        "mean_kl": found.mean_kl,
        "top1_agreement_share": found.top1_agreement,
    }
