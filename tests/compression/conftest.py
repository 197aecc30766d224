"""A tiny model on the 4-bit grid, tuned hard enough to have learnt something."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from herdbook.book.book import Book

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))


@pytest.fixture(scope="session")
def raised(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Book:
    """A book with «base» (a Q4_1 GGUF), «rows», and two adapters, «plain» and «grouped»."""
    from raising import stock, tune

    from herdbook.model.checkpoint import load_decoder, save_gguf
    from herdbook.tokens.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("q4")
    decoder = load_decoder(tiny_folder, dtype=torch.float32)
    save_gguf(decoder, Tokenizer.load(tiny_folder), folder / "model.gguf", "Q4_1")
    book, _, _ = stock(tmp_path_factory.mktemp("home"), folder)
    for name, group in (("plain", 1), ("grouped", 32)):
        tune(dropout=0.0, epochs=4, targets=("q", "v", "down"), group=group).run(book, name=name)
    return book
