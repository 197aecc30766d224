"""Greedy replies of SmolLM2 in float32 equal transformers' generate, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.model.checkpoint import load_decoder, source_config, tensors
from herdbook.model.decoder import Decoder
from herdbook.model.families import families
from herdbook.tokens.chat import render
from herdbook.tokens.tokenizer import Tokenizer

TOKENS = 64
CHATS = [
    "Who are you?",
    "What is the capital of France, and what is it known for?",
    "Write a haiku about a herd of llamas.",
    "你好，你是谁？",
    "Explain photosynthesis to a child of six.",
    "def fibonacci(n):",
    "List five uses of a paper clip.",
]
TEXTS = [
    "The history of writing begins",
    "1, 1, 2, 3, 5, 8,",
    "Once upon a time, on a farm high in the Andes, " * 12,
]


@pytest.fixture(scope="module")
def decoder(smollm2_path: Path) -> Decoder:
    return load_decoder(smollm2_path, dtype=torch.float32)


def theirs(decoder: Decoder, prompts: list[list[int]], eos: int) -> list[list[int]]:
    """transformers' model with the same weights, all prompts in one batch padded on the left."""
    from transformers import LlamaConfig, LlamaForCausalLM

    family = families()[decoder.family]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**source_config(decoder)))
    state = {family.hf_name(name): tensor for name, tensor in tensors(decoder, torch.float32)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffer was on meta
    model.eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    found = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=TOKENS,
        eos_token_id=eos,
        pad_token_id=0,
        use_cache=True,
    )[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in found]


def test_greedy_equals_transformers(decoder: Decoder, smollm2_path: Path) -> None:
    tokenizer = Tokenizer.load(smollm2_path)
    prompts = [render(tokenizer, [{"role": "user", "content": t}], reply=True).ids for t in CHATS]
    prompts += [tokenizer.encode(text) for text in TEXTS]
    (eos,) = {tokenizer.eos_id}
    assert eos is not None
    # a small budget, so that the longer prompts come in chunks between the others' tokens
    engine = Engine(decoder, tokenizer, max_batch_tokens=48)
    engine.intake.stop_ids = frozenset({eos})
    replies = engine.generate([Request(ids, Sampling(max_tokens=TOKENS)) for ids in prompts])
    expected = theirs(decoder, prompts, eos)
    for ids, reply, row in zip(prompts, replies, expected, strict=True):
        assert list(reply.ids) == row, tokenizer.decode(ids, specials=True)
    assert sum(reply.finish == "length" for reply in replies) >= 5
    assert all(reply.text for reply in replies)
