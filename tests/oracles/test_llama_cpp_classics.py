"""llama.cpp reads what we write of the families of 2019–2023 and gives the same chances.

Chances, not replies: llama.cpp takes every GELU by tanh and from a table in float16, so that where a
random model's two best tokens are near, the replies part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from herdbook.model.checkpoint import load_decoder, save_gguf
from herdbook.tokens.tokenizer import Tokenizer
from tests.oracles.test_llama_cpp import LlamaCpp
from tests.oracles.test_model_classics import IN_GGUF, SHAPES, ours


def chances(server: LlamaCpp, prompt: list[int], letter: int, best: int) -> dict[int, float]:
    """The log-chances of the likeliest next tokens, by id.

    It tells them with text alone, so it is made to draw a letter; the chances are those before.
    """
    ask: dict[str, Any] = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": best}
    ask["logit_bias"] = [[letter, 1000]]
    url = f"{server.server.listening_address}/completion"
    reply = httpx.post(url, json=ask | {"cache_prompt": False}, timeout=120).json()
    (first,) = reply["completion_probabilities"]
    return {one["id"]: one["logprob"] for one in first["top_logprobs"]}


@pytest.mark.parametrize("shape", IN_GGUF)
def test_classics(shape: str, tiny_folder: Path, tmp_path: Path) -> None:
    name, settings = SHAPES[shape]
    tokenizer = Tokenizer.load(tiny_folder)
    torch.manual_seed(5)
    kind = getattr(transformers, name)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = kind.config_class(vocab_size=tokenizer.size, initializer_range=0.2, **ids, **settings)
    model = kind(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias") or "norm" in key or "ln_" in key:
                value.add_(torch.randn_like(value) * 0.3)
            elif "dense" in key or "c_proj" in key:  # lest a tied head repeats the last token
                value.mul_(2)
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    written = tmp_path / f"{shape}.gguf"
    save_gguf(decoder, tokenizer, written, "F32")
    server = LlamaCpp(written)
    for length in (1, 7, 60):
        prompt = torch.randint(3, tokenizer.size, (length,)).tolist()
        want = ours(decoder, prompt)[-1].log_softmax(-1)
        found = chances(server, prompt, tokenizer.encode("a")[0], 20)
        assert len(found) == 20 and want.std() > 1
        assert max(abs(float(want[id]) - chance) for id, chance in found.items()) <= 0.01
