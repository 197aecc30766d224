"""A classifier: learnt, saved as transformers has it, asked by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

import herdbook
from herdbook.errors import FamilyError, RequestError
from herdbook.model.checkpoint import load_decoder, save_gguf, save_hf
from herdbook.training.classify import Labelled, Labels, put_score
from tests.oracles.peers import differ, make, prompt
from tests.training.raising import classify, stock


@pytest.mark.parametrize("how", [{"method": "full"}, {"dora": True, "learning_rate": 1e-2}])
def test_learns_and_transformers_says_the_same(
    how: dict[str, Any], tmp_path: Path, tiny_folder: Path
) -> None:
    book, _, _ = stock(tmp_path / "home", tiny_folder)
    made = classify(tmp_path, **how).run(book, name="judge")
    assert made.kind == "model" and made.metrics["loss"] < 0.5 * made.metrics["first_loss"]
    assert made.metrics["heldout"] == 6 and made.metrics["heldout_accuracy_share"] >= 0.6
    model = herdbook.load("judge", book=book, dtype="float32")
    peer = AutoModelForSequenceClassification.from_pretrained(made.path, dtype=torch.float32).eval()
    assert type(peer).__name__ == "LlamaForSequenceClassification"
    assert peer.config.id2label == {0: "cat", 1: "dog", 2: "牛"}
    texts = ["a small model", "hello who are you", "你好 你好"]
    for text, chances in zip(texts, model.classify(texts), strict=True):
        ids = model.tokenizer.prompt(text)
        with torch.inference_mode():
            theirs = peer(torch.tensor([ids])).logits.softmax(-1)[0]
        assert list(chances) == ["cat", "dog", "牛"]
        assert differ(torch.tensor(list(chances.values())), theirs) <= 1e-4
    with pytest.raises(FamilyError, match="cannot be written as GGUF"):
        save_gguf(model.decoder, None, tmp_path / "x.gguf", "F32")
    with pytest.raises(RequestError, match="this model has no labels"):
        herdbook.load("base", book=book).classify(["a"])


@pytest.mark.parametrize("shape", ["llama", "gpt2", "neox"])
def test_loss_and_gradient_are_the_plain_ones(shape: str, tmp_path: Path) -> None:
    """Of documents in one pack as of each alone; the saved head is transformers'."""
    make(shape, tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", torch.float32)
    put_score(decoder, ("a", "b", "c"), seed=1)
    save_hf(decoder, None, tmp_path / "judge", torch.float32)
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").float().eval()
    again = load_decoder(tmp_path / "judge", torch.float32)
    assert again.config == decoder.config
    again.requires_grad_(True)
    objective = Labels(again)
    rows = [Labelled(prompt(n, seed=n), [False] * n, n % 3) for n in (5, 9, 2)]
    [pack] = objective.packs(rows, 16)
    loss = objective.loss(pack)
    plain = sum(
        cross_entropy(peer(torch.tensor([row.ids])).logits.float(), torch.tensor([row.label]))
        for row in rows
    )
    assert loss.item() == pytest.approx(plain.item(), rel=1e-4)
    loss.backward()
    plain.backward()
    assert again.score is not None
    torch.testing.assert_close(
        again.score.weight.grad, peer.score.weight.grad, rtol=1e-3, atol=1e-4
    )
    theirs = next(
        p
        for n, p in peer.named_parameters()
        if n.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))
    )
    torch.testing.assert_close(again.embed.weight.grad, theirs.grad, rtol=1e-3, atol=1e-4)
