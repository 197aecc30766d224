"""Init: the sizes asked for, weights of the right spread, and the same again from the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from herdbook.book.book import Book
from herdbook.errors import ConfigError
from herdbook.model.checkpoint import load_decoder
from herdbook.model.init import Init
from herdbook.tokens.fetch import FetchTokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_have_the_right_spread(book: Book, tiny_folder: Path, family: str) -> None:
    FetchTokenizer(path=str(tiny_folder)).run(book, name="tokens")
    step = Init(tokenizer="tokens", family=family, hidden=64, layers=8, heads=4, context=64)
    made = step.run(book)
    decoder = load_decoder(made.path, dtype=torch.float32)
    assert decoder.family == family and decoder.parameter_count() == made.metrics["parameters"]
    for name, weight in decoder.named_parameters():
        if weight.dim() < 2:
            assert weight.eq(0.0 if name.endswith("bias") else 1.0).all(), name
        else:
            small = name.endswith(("attention.o.weight", "mlp.down.weight"))
            wanted = 0.02 / 4 if small else 0.02  # √(2 · 8 layers)
            assert weight.std() == pytest.approx(wanted, rel=0.08), name
    again = load_decoder(
        Init(**{**vars(step), "std": 0.01}).run(book, name="other").path, torch.float32
    )
    pairs = zip(decoder.named_parameters(), again.parameters(), strict=True)
    for (_, a), b in ((one, two) for one, two in pairs if two.dim() > 1):
        torch.testing.assert_close(a, 2 * b)  # the seed draws, std scales


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="each head needs an even share"):
        Init(tokenizer="x", hidden=100, heads=8).check()
    with pytest.raises(ConfigError, match="kv_heads must divide"):
        Init(tokenizer="x", hidden=64, heads=8, kv_heads=3).check()
