"""Give a model another vocabulary: rows of its embedding and head are kept, made or left out.

A row belongs to a token, not to an id. So a tokenizer that was extended, pruned or trained anew can
take the place of the model's own: tokens that both have keep their row, a new token starts from the
mean of the rows of its old pieces, and the rest goes. An extended model has to be trained to use what
it got; a pruned one gives the same logits as before on the tokens that stayed, bit for bit.

V old rows, N new rows, hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from herdbook.book.book import Artifact, Book
from herdbook.book.step import Bench, Input, Step, require
from herdbook.errors import ConfigError, UnknownName, nearest
from herdbook.files import gguf
from herdbook.model.checkpoint import (
    Checkpoint,
    check_vocabulary,
    load_decoder,
    open_checkpoint,
    save_hf,
)
from herdbook.model.decoder import Decoder
from herdbook.model.fetch import Fetch
from herdbook.model.references import EMBEDDED, may_be_name, resolve
from herdbook.progress import Progress
from herdbook.tokens import rwkv
from herdbook.tokens.extend import ExtendTokenizer
from herdbook.tokens.fetch import FetchTokenizer
from herdbook.tokens.prune import PruneTokenizer
from herdbook.tokens.rows import Rows, rows
from herdbook.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Refit(Step):
    """Fit a model to another tokenizer: rows of embedding and head are kept, made or left out."""

    kind: ClassVar[str] = "model"
    changes: ClassVar[tuple[str, ...]] = ("model",)

    model: Input = ""
    tokenizer: Input = ""

    def check(self) -> None:
        require(self, "model", "tokenizer")

    def make(self, bench: Bench) -> dict[str, Any]:
        source = bench.artifact("model")
        checkpoint = open_checkpoint(source.path)
        old = Tokenizer.load(source.path)
        new = Tokenizer.load(bench.artifact("tokenizer").path)
        check_vocabulary(checkpoint.config, old.size)
        matched = rows(old, new)
        dtype = stored_dtype(checkpoint)
        decoder = load_decoder(source.path, dtype)
        before = decoder.parameter_count()
        refit(decoder, matched)
        after = decoder.parameter_count()
        save_hf(decoder, new, bench.out, dtype)
        return {
            "vocabulary_before": checkpoint.config.vocab,
            "vocabulary": decoder.config.vocab,
            "kept_rows": len(matched.same),
            "new_rows": len(matched.new),
            "parameters_before": before,
            "parameters": after,
            "format": str(dtype).removeprefix("torch."),
            "weights_before_bytes": before * dtype.itemsize,
            "weights_bytes": after * dtype.itemsize,
        }


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The narrowest format that holds every stored weight exactly (a GGUF's blocks: float32)."""
    stored = {checkpoint.dtype(name) for name in checkpoint.names}
    return stored.pop() if len(stored) == 1 else torch.float32


@torch.no_grad()
def refit(decoder: Decoder, matched: Rows) -> None:
    """Rows of embedding and head [V, hidden] → [N, hidden], and the ids in the configuration."""
    vocabulary = decoder.config.vocab
    for module in (decoder.embed, decoder.head):
        if module is None:
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            assert parameter.shape[0] == vocabulary
            value = nn.Parameter(mean_rows(parameter, matched.of), parameter.requires_grad)
            setattr(module, name, value)
    if decoder.head is not None:
        decoder.head.outputs = len(matched.of)
    decoder.config = dataclasses.replace(decoder.config, vocab=len(matched.of))
    for key, ids in list(decoder.source_config.items()):
        if key.endswith("_token_id") and ids is not None:
            many = ids if isinstance(ids, list) else [ids]
            new = [matched.same[id] for id in many if id in matched.same]
            one = new[0] if new else None
            decoder.source_config[key] = new if isinstance(ids, list) else one


def mean_rows(matrix: Tensor, of: Sequence[Sequence[int]]) -> Tensor:
    """matrix [V, …], of N lists of row numbers → [N, …]: rows copied, or their mean in float32.

    An empty list gives the mean of all rows.
    """
    first = torch.tensor([ids[0] if ids else 0 for ids in of], device=matrix.device)
    out = matrix.index_select(0, first)
    for row, ids in enumerate(of):
        if len(ids) != 1:
            some = matrix[list(ids)] if ids else matrix
            out[row] = some.float().mean(0).to(matrix.dtype)
    return out


# --- the whole way, for `herd tokenizer`


def bring(ref: str, book: Book, progress: Progress | None = None) -> Artifact:
    """A model or a tokenizer as an artifact: from the book, or from outside into it."""
    artifact = book.find(ref)
    if artifact is not None:
        if artifact.kind not in ("model", "tokenizer"):
            raise ConfigError(
                f"{ref} is a {artifact.kind}",
                rule="and neither a model nor a tokenizer",
                next="see: herd list",
            )
        return artifact
    path = _outside(ref, book)
    if path.exists() and not _holds_weights(path):
        return FetchTokenizer(path=str(path)).run(book, progress=progress)
    return Fetch(ref=ref).run(book, progress=progress)


def _holds_weights(path: Path) -> bool:
    if rwkv.weights(path) is not None:
        return True
    if path.is_dir():
        return (path / "config.json").is_file() or (path / "model.gguf").is_file()
    return path.suffix == ".gguf" and bool(gguf.read(path).tensors)


def tokenizer_of(ref: str, book: Book) -> Tokenizer:
    """The tokenizer that any reference leads to."""
    artifact = book.find(ref)
    path = artifact.path if artifact is not None else _outside(ref, book)
    return Tokenizer.load(path if path.exists() else resolve(ref, book))


def _outside(ref: str, book: Book) -> Path:
    """Where a reference that is not in the book leads; of what is to be fetched, where nothing is."""
    path = Path(ref).expanduser()
    if not path.exists() and may_be_name(ref):
        known = [one.name for kind in ("model", "tokenizer") for one in book.entries(kind)]
        raise UnknownName(
            f"{ref!r}",
            rule="is no model and no tokenizer of the book, no folder or file, not smollm2 and not "
            "hf:org/name",
            next=nearest(ref, list(dict.fromkeys([*known, *EMBEDDED]))),
        )
    return path


def extend(
    ref: str, pieces: str, book: Book, *, name: str = "", progress: Progress | None = None
) -> Artifact:
    """A model (or a tokenizer alone) with the pieces of a second SentencePiece tokenizer."""
    more, base = (bring(one, book, progress) for one in (pieces, ref))  # the smaller one first
    step = ExtendTokenizer(tokenizer=base.id, pieces=more.id)
    return _fit(step, base, book, name or f"{base.name}-extended", progress)


def prune(
    ref: str,
    text: Sequence[str],
    book: Book,
    *,
    name: str = "",
    progress: Progress | None = None,
) -> Artifact:
    """A model (or a tokenizer alone) without the tokens that `text` (files, datasets) does not need."""
    base = bring(ref, book, progress)
    files, data = split(text, book)
    step = PruneTokenizer(text=files, data=data, tokenizer=base.id)
    return _fit(step, base, book, name or f"{base.name}-pruned", progress)


def _fit(
    step: ExtendTokenizer | PruneTokenizer,
    base: Artifact,
    book: Book,
    name: str,
    progress: Progress | None,
) -> Artifact:
    if base.kind == "tokenizer":
        return step.run(book, name=name, progress=progress)
    tokenizer = step.run(book, name=f"{name}-tokenizer", progress=progress)
    fitted = Refit(model=base.id, tokenizer=tokenizer.id)
    return fitted.run(book, name=name, progress=progress)


def split(text: Sequence[str], book: Book) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a user calls text: files, and datasets of the book."""
    files: list[str] = []
    data: list[str] = []
    for one in text:
        artifact = None if Path(one).exists() else book.find(one)
        if artifact is None:
            files.append(one)
        elif artifact.kind != "dataset":
            raise ConfigError(
                f"{one} is a {artifact.kind}",
                rule="where a text file or a dataset was expected",
                next="see: herd list --kind dataset",
            )
        else:
            data.append(artifact.id)
    return tuple(files), tuple(data)
