"""`herdbook.load(ref)`: from any reference to a model to talk to.

A file that the native step reads as it lies is begun with first of all; everything else is imported,
and the tokenizer made, while its weights are packed in a thread of their own.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from herdbook.engine.packaged import Packaged, packaged
from herdbook.errors import ConfigError, FileError, nearest
from herdbook.model.references import ADAPTER, may_be_name, resolve

if TYPE_CHECKING:
    import torch

    from herdbook.book.book import Book
    from herdbook.engine.loaded import LoadedModel
    from herdbook.model.decoder import Decoder
    from herdbook.model.interface import Model

#: how an engine's cache may keep its numbers
CacheType = Literal["float32", "bfloat16", "int8"]

Device = Literal["cpu", "cuda"]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def load(
    ref: str | Path,
    *,
    book: Book | None = None,
    dtype: str | torch.dtype | None = None,
    device: Device | None = None,
    quantised: bool = True,
    template: str | None = None,
) -> LoadedModel:
    """The model behind a reference: a name in the book, a folder, a .gguf, smollm2, hf:org/name.

    An adapter loads its base model and sits on it unmerged (PEQA's scales take the place of the base's,
    whose codes stay, so quantised is always so). device: cpu or cuda (default: cuda where torch sees a
    GPU). dtype: what is computed in (default: bfloat16 where that hardware multiplies it, else float32).
    quantised=False dequantises a GGUF or a folder.
    template: a chat template to use instead of the model's own, by its name or its file.
    """
    source = _template(template) if template else None
    ref, number, where = str(ref), _dtype(dtype), _device(device)
    book = book or _book(ref)
    path = _find(ref, book)
    model: Model | None = None
    base: Path | None = None
    if (path / ADAPTER).is_file():
        from herdbook.model.lora import merge_lora
        from herdbook.training import peft_format

        base = _base_of(path, book)
        scales = peft_format.method(path) == "PEQA"
        rounded = peft_format.kept(path) == "nf4"  # it learnt beside such weights
        model = _opened(base, number, where, quantised=scales, nf4=rounded)
        peft_format.load(model, path)
        if scales:  # the same codes with other scales: nothing is lost, and the kernels fit
            merge_lora(model)
        model.requires_grad_(False)
        model.to(where)
    elif number is None and quantised and where == "cpu":
        model = packaged(path)
    model = model or _opened(path, number, where, quantised)
    with model.preparing() if isinstance(model, Packaged) else nullcontext():
        from herdbook.engine.loaded import LoadedModel
        from herdbook.tokens.tokenizer import Tokenizer

        there = [one for one in (path, base) if one and Tokenizer.exists(one)]
        tokenizer = Tokenizer.load(there[0], source) if there else None
    return LoadedModel(model, tokenizer, path)


def _template(given: str) -> str:
    from herdbook.tokens import templates

    return templates.read(given)


def _book(ref: str) -> Book | None:
    """The book, where it has to be asked for this reference."""
    if not may_be_name(ref):
        return None
    from herdbook.book.book import Book

    return Book()


def _opened(
    path: Path, dtype: str | None, device: str, quantised: bool = False, nf4: bool = False
) -> Decoder:
    import torch

    from herdbook.model.checkpoint import load_decoder
    from herdbook.model.precision import compute_dtype

    number = compute_dtype(device) if dtype is None else getattr(torch, dtype)
    return load_decoder(path, dtype=number, quantised=quantised, nf4=nf4).to(device)


def _device(given: str | None) -> str:
    if given not in (None, "cpu", "cuda"):
        raise ConfigError(f"device={given!r}", rule="is not known", next="give cpu or cuda")
    if given == "cpu" or (given is None and not may_have_gpu()):
        return "cpu"
    from herdbook.model.precision import compute_device

    found = compute_device()
    if given == "cuda" and found != "cuda":
        raise ConfigError(
            "device='cuda'",
            rule="is not there: torch sees no GPU, or was built without CUDA",
            next="leave it out, or install a torch that was built with CUDA (herd doctor)",
        )
    return found


def may_have_gpu() -> bool:
    """Whether torch, which takes long to import, has to be asked."""
    return any(Path(one).exists() for one in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def adapter_folder(ref: str, book: Book | None = None) -> Path:
    """The folder of an adapter: a name in the book, a folder, hf:org/name."""
    path = _find(ref, book)
    if not (path / ADAPTER).is_file():
        raise FileError(
            f"{ref}",
            rule=f"is no adapter: it has no {ADAPTER}",
            next="name an adapter of the book (herd list), or a folder that peft wrote",
        )
    return path


def _find(ref: str, book: Book | None) -> Path:
    artifact = book.find(ref) if book is not None else None
    if artifact is not None and artifact.kind == "adapter":
        return artifact.path
    return resolve(ref, book)


def _base_of(adapter: Path, book: Book | None) -> Path:
    """The model that an adapter was trained on, by its own word."""
    file = adapter / ADAPTER
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise FileError(
            f"{file}", rule=f"is no JSON object ({error})", next="fetch the adapter again"
        ) from error
    if not base:
        raise FileError(
            f"{file}",
            rule="does not name its base model (base_model_name_or_path)",
            next="write the base model's folder or name there",
        )
    return resolve(str(base), book or _book(str(base)))


def _dtype(given: str | torch.dtype | None) -> str | None:
    """Its name."""
    name = None if given is None else str(given).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise ConfigError(f"dtype={given!r}", rule="is not known", next=nearest(name, list(DTYPES)))
    return name
