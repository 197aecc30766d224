"""Prefix models, which transformers does not know: golden files of the original code, and a plain
computation of the papers' formulas, written here from the checkpoints' own names and layouts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.engine.runner import Runner
from herdbook.engine.sampling import Chooser
from herdbook.engine.sequence import Sequence
from herdbook.engine.text import TextOut
from herdbook.model.checkpoint import load_decoder, save_hf
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_source, families
from herdbook.model.layout import Masked, Packed
from herdbook.model.prefix import find_context

SOP, GMASK, MASK = 118, 117, 116
SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_layers": 3,
    "num_attention_heads": 4,
    "inner_hidden_size": 96,
    "max_sequence_length": 128,
    "bos_token_id": SOP,
    "gmask_token_id": GMASK,
    "mask_token_id": MASK,
}
MODELS = {
    "chatglm": SIZES | {"model_type": "chatglm"},
    "chatglm-1d": SIZES | {"model_type": "chatglm", "position_encoding_2d": False},
    "glm-130b": SIZES | {"model_type": "glm-130b"},
}


@pytest.fixture(params=MODELS)
def made(request: Any, tmp_path: Path) -> tuple[dict[str, Any], Decoder, dict[str, Tensor]]:
    """The configuration, a random decoder, and its weights as a checkpoint has them."""
    source = MODELS[request.param]
    family = by_source(source, "here")
    decoder = Decoder(family.config(source, "here"))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(float("norm.weight" in name), 0.3)
    decoder.family = family.name
    save_hf(decoder, None, tmp_path, torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == source["model_type"]
    return source, load_decoder(tmp_path, torch.float32), load_file(tmp_path / "model.safetensors")


def plain(source: dict[str, Any], weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits [T, vocab] by the formulas, one head and one token at a time where that is clearer."""
    heads, layers = source["num_attention_heads"], source["num_layers"]
    size = source["hidden_size"] // heads
    big, two = source["model_type"] == "glm-130b", source.get("position_encoding_2d", True)
    two = two and not big
    alpha = math.sqrt(2 * layers) if big else math.sqrt(56)
    c = ids.index(SOP)
    mask = GMASK if GMASK in ids else MASK
    places, blocks = list(range(len(ids))), [0] * len(ids)
    for i in range(c, len(ids)):
        if two or mask == MASK:
            places[i] = ids.index(mask)
        blocks[i] = i - c + 1

    def turn(x: Tensor, place: int) -> Tensor:
        n = len(x) // 2
        angles = torch.tensor([place * 10_000 ** (-i / n) for i in range(n)])
        a, b = x[:n], x[n:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    def rotated(x: Tensor, i: int) -> Tensor:
        if not two:
            return turn(x, places[i])
        half = len(x) // 2
        return torch.cat([turn(x[:half], places[i]), turn(x[half:], blocks[i])])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
        )

    x = weights["transformer.word_embeddings.weight"][ids]
    for layer in range(layers):
        at = f"transformer.layers.{layer}"
        a = norm(x, f"{at}.input_layernorm")
        packed = linear(a, f"{at}.attention.query_key_value").view(len(ids), heads, 3, size)
        outs = []
        for head in range(heads):
            q = torch.stack([rotated(packed[i, head, 0], i) for i in range(len(ids))])
            k = torch.stack([rotated(packed[i, head, 1], i) for i in range(len(ids))])
            scores = q @ k.T / math.sqrt(size)
            for i in range(len(ids)):
                for j in range(len(ids)):
                    if j > i and j >= c:
                        scores[i, j] = -math.inf
            outs.append(scores.softmax(-1) @ packed[:, head, 2])
        h = alpha * a + linear(torch.cat(outs, -1), f"{at}.attention.dense")
        m = norm(h, f"{at}.post_attention_layernorm")
        inner = linear(m, f"{at}.mlp.dense_h_to_4h")
        if big:
            one, other = inner.chunk(2, -1)
            inner = one * F.gelu(other)
        else:
            inner = F.gelu(inner, approximate="tanh")
        x = alpha * m + linear(inner, f"{at}.mlp.dense_4h_to_h")
    return norm(x, "transformer.final_layernorm") @ weights["transformer.word_embeddings.weight"].T


def text(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 110, (count,), generator=generator).tolist()


DOCUMENTS = {
    "a chat": [*text(17, 0), GMASK, SOP, *text(9, 1)],
    "the same length, another context": [*text(5, 2), GMASK, SOP, *text(21, 3)],
    "nothing before": [GMASK, SOP, *text(12, 4)],
    "a gap in the text": [*text(6, 5), MASK, *text(4, 6), SOP, *text(7, 7)],
    "both marks": [MASK, *text(3, 8), GMASK, SOP, *text(3, 9), SOP, GMASK, MASK, *text(3, 10)],
}


@pytest.mark.parametrize("document", DOCUMENTS)
@torch.inference_mode()
def test_the_papers_formulas(made: Any, document: str) -> None:
    source, decoder, weights = made
    ids = DOCUMENTS[document]
    got = decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))
    want = plain(source, weights, ids)
    assert want.std(0).min() > 0.3, "what is said depends on the token"
    assert (got - want).abs().max() <= 1e-4


@torch.inference_mode()
def test_packed_documents_are_what_they_are_alone(made: Any) -> None:
    _, decoder, _ = made
    documents = [*DOCUMENTS.values(), text(8, 11)]  # the last one without marks: causal
    lengths = [len(one) for one in documents]
    ids = torch.tensor([one for document in documents for one in document])
    packed = decoder(ids, Packed(lengths))
    torch.testing.assert_close(packed, decoder(ids, Masked(lengths)), atol=1e-4, rtol=1e-4)
    for document, part in zip(documents, packed.split(lengths), strict=True):
        alone = decoder(torch.tensor(document), Packed([len(document)]))
        torch.testing.assert_close(part, alone, atol=1e-4, rtol=1e-4)


def test_the_engine_computes_a_context_at_once_and_shares_it_with_its_like(made: Any) -> None:
    _, decoder, _ = made
    common = text(9, 0)
    prompts = [
        [*common, *text(22, 1), GMASK, SOP],  # longer than a step
        [*common, *text(3, 2), GMASK, SOP],
        [*common, *text(3, 2), GMASK, SOP],
        [*common, GMASK, SOP, *text(40, 4)],  # chunks of a reply that goes on
        [GMASK, SOP],
        [*text(7, 5), MASK, *text(2, 6), SOP],
    ]
    engine = Engine(decoder, None, page_tokens=4, pages=60, max_batch_tokens=12)
    sampling = Sampling(max_tokens=10, ignore_eos=True)

    def check(cached: list[int]) -> None:
        replies = engine.generate([Request(ids, sampling) for ids in prompts])
        for ids, reply in zip(prompts, replies, strict=True):
            whole = list(ids)
            for _ in range(10):
                with torch.inference_mode():
                    hidden = decoder(torch.tensor(whole), Packed([len(whole)]))
                    whole.append(int(decoder.logits(hidden[-1:]).argmax()))
            assert list(reply.ids) == whole[len(ids) :]
        assert [reply.cached_tokens for reply in replies] == cached

    check([0, 0, 12, 0, 0, 0])  # equal prompts share; those that only begin alike do not
    check([32, 12, 12, 48, 0, 8])
    engine.pool.check()


def test_a_preempted_context_is_computed_anew(made: Any) -> None:
    _, decoder, _ = made
    prompts = [[*text(14 + n, n), GMASK, SOP] for n in range(5)]
    roomy = Engine(decoder, None, page_tokens=4, pages=200)
    tight = Engine(decoder, None, page_tokens=4, pages=14, max_batch_tokens=8)
    requests = [Request(ids, Sampling(max_tokens=16, ignore_eos=True)) for ids in prompts * 2]
    want, got = (engine.generate(requests) for engine in (roomy, tight))
    assert [one.ids for one in got] == [one.ids for one in want]
    assert tight.scheduler.preemptions > 0


def test_of_a_context_only_the_first_pages_are_still_known(made: Any) -> None:
    _, decoder, _ = made
    engine = Engine(decoder, None, page_tokens=4, pages=14, max_batch_tokens=8)
    sampling = Sampling(max_tokens=16, ignore_eos=True)
    first, other = ([*text(20, n), GMASK, SOP] for n in (0, 1))
    (before,), _, (after,) = (
        engine.generate([Request(ids, sampling)]) for ids in (first, other, first)
    )
    assert 0 < after.cached_tokens < 21
    assert after.ids == before.ids


def test_training_reaches_the_context(made: Any) -> None:
    """The loss on a reply teaches how its context is read, last token first to the first alike."""
    _, decoder, _ = made
    decoder.requires_grad_(True)
    ids = torch.tensor(DOCUMENTS["a chat"])
    layout = Packed([len(ids)])
    x = decoder.start(ids, layout)
    x.retain_grad()
    decoder.finish(decoder.through(x, layout))[:1].sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum(-1) > 0
    assert reached[:18].all() and not reached[18:].any(), "row 0 sees the context, not the reply"


def test_golden_chatglm_6b(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared_data("golden/chatglm-6b")
    expected = load_file(folder / "expected.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"bos_token_id": 2, "gmask_token_id": 1, "mask_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    decoder = load_decoder(tmp_path, torch.float32)
    prompt = expected["step0.input_ids"].tolist()
    ids = [*prompt, *expected["step1.input_ids"].tolist(), *expected["step2.input_ids"].tolist()]
    places = torch.cat([expected[f"step{n}.position_ids"] for n in range(3)], 1)
    layout = Packed([5])
    with torch.inference_mode():
        whole = decoder(torch.tensor(ids), layout)
    assert torch.equal(layout.positions, places.T)
    want = torch.cat([expected[f"step{n}.last_hidden_state"] for n in range(3)])
    assert (whole - want).abs().max() <= 1e-5

    # and step by step, with the cache
    request = Request(prompt)
    chooser = Chooser(request.sampling, prompt, 5)
    context = find_context(prompt, decoder.config)
    sequence = Sequence(request, 8, chooser, TextOut(None, ()), context)
    sequence.pages, sequence.scheduled = [0, 1], 3
    runner = Runner(decoder, 2, 4)
    for step, token in enumerate([3, 4, 0]):
        logits = runner.run([sequence])
        last = expected[f"step{step}.last_hidden_state"][-1:]
        assert logits is not None
        assert (torch.from_numpy(logits) - decoder.logits(last)).abs().max() <= 1e-5
        sequence.computed += sequence.scheduled
        sequence.append(token)
        sequence.scheduled = 1


def test_the_two_chatglms_are_told_apart() -> None:
    assert by_source(MODELS["chatglm"], "here").name == "chatglm"
    assert not families()["chatglm"].mine({"model_type": "chatglm", "ffn_hidden_size": 13696})
    old = families()["chatglm"].config(
        {k: v for k, v in SIZES.items() if not k.endswith("_id")} | {"vocab_size": 150_528}, "here"
    )
    assert old.prefix is not None
    assert (old.prefix.start, old.prefix.whole, old.prefix.blank) == (150_004, 150_001, 150_000)
