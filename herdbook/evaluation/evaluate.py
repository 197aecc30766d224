"""Measure one model as it is: `herd eval REF`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from herdbook.book.book import Book
from herdbook.evaluation.perplexity import default_texts, read_text
from herdbook.evaluation.report import Heldout, flat, side
from herdbook.model.references import resolve


def evaluate(ref: str, book: Book | None, text: Path | str | None = None) -> dict[str, Any]:
    """Perplexity, size, speed, memory; identity where its pedigree holds questions about it.

    ref: any reference to a model. text: a file of the user's own for the perplexity.
    """
    texts = {"text": read_text(Path(text))} if text else default_texts()
    artifact = book.find(ref) if book else None
    family = tuple(book.ancestors(artifact)) if book and artifact else ()
    heldout = Heldout.of(tuple(one for one in family if one.kind == "dataset"))
    return flat(side(resolve(ref, book), texts, heldout))
