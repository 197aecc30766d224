"""llama.cpp reads what we write of the families of 2023 and later, and continues greedily alike."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.model.checkpoint import load_decoder, save_gguf
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_source
from herdbook.tokens.tokenizer import Tokenizer
from tests.model.test_families import FIXTURES, random_decoder
from tests.oracles.peers import ours
from tests.oracles.test_llama_cpp import LlamaCpp

TOKENS = 12
#: fixture → what llama.cpp needs besides: it knows Baichuan by its layers, and has no window in a
#: "llama", so a Mistral is the same only within it
MODERN: dict[str, dict[str, Any]] = {
    "baichuan": {"num_hidden_layers": 32},
    "baichuan-2": {"num_hidden_layers": 32},
    "baichuan-13b": {"num_hidden_layers": 40},
    "chatglm2": {},
    "chatglm2-32k": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "internlm": {},
    "internlm2": {},
    "llama": {},
    "llama-tied": {},
    "mistral": {"sliding_window": 100},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {},
    "yi": {},
}


@pytest.mark.parametrize("name", MODERN)
def test_moderns(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    source = json.loads(FIXTURES[name].read_text()) | MODERN[name]
    vocab = next(key for key in ("vocab_size", "padded_vocab_size") if key in source)
    source[vocab] = tokenizer.size
    family = by_source(source, name)
    decoder = random_decoder(family.config(source, name))
    decoder.family = family.name
    written = tmp_path / f"{name}.gguf"
    save_gguf(decoder, tokenizer, written, "F32")

    dice = random.Random(5)
    prompts = [[dice.randrange(3, tokenizer.size) for _ in range(n)] for n in (3, 9, 23, 40)]
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
    requests = [Request(ids, sampling) for ids in prompts]
    replies = Engine(decoder, None).generate(requests)
    again = Engine(load_decoder(written, decoder.dtype), None).generate(requests)
    theirs = LlamaCpp(written)
    alike = 0
    for ids, reply, same in zip(prompts, replies, again, strict=True):
        assert reply.ids == same.ids
        found, _ = theirs(ids, TOKENS)
        alike += agreed(decoder, ids, list(reply.ids), found, tokenizer.stop_ids)
    assert alike >= 2 * TOKENS


def agreed(
    decoder: Decoder, ids: list[int], mine: list[int], theirs: list[int], ends: frozenset[int]
) -> int:
    """How many tokens are the same. They may part only where two are as likely, for all that
    llama.cpp's arithmetic tells (measured: it moves a log-chance by up to 0.003); it stops at `ends`.
    """
    for step, token in enumerate(mine):
        others = {theirs[step]} if step < len(theirs) else ends
        if token in others:
            if token in ends:
                return step
            continue
        logits = ours(decoder, ids + mine[:step])[-1]
        assert min(float(logits[token] - logits[other]) for other in others) <= 0.01
        return step
    return len(mine)
