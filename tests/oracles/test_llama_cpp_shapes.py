"""llama.cpp reads what we write of the decoders that transformers knows, and gives the same chances.

Chances, not replies: llama.cpp takes every GELU by tanh and from a table in float16, as SiLU, so that
where a random model's two best tokens are near, the replies part.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from herdbook.model.checkpoint import load_decoder, save_gguf
from herdbook.tokens.tokenizer import Tokenizer
from tests.oracles.peers import ours, random_model
from tests.oracles.shapes import IN_GGUF, SHAPES
from tests.oracles.test_llama_cpp import LlamaCpp

#: what it computes otherwise; the export says so
OTHERWISE = {
    "mistral-window": "a llama has no window there, so a Mistral is the same only within it",
    "mixtral-window": "likewise",
}


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


@pytest.mark.parametrize("shape", [one for one in IN_GGUF if one not in OTHERWISE])
def test_chances(shape: str, tiny_folder: Path, tmp_path: Path) -> None:
    name, settings = SHAPES[shape]
    tokenizer = Tokenizer.load(tiny_folder)
    model = random_model(
        name, settings | {"vocab_size": tokenizer.size, "initializer_range": 0.2}, 5
    )
    with torch.no_grad():
        for key, value in model.named_parameters():
            # lest a tied head repeats the last token
            if re.search(r"(dense.*|c_proj)\.weight$", key):
                value.mul_(2)
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    written = tmp_path / f"{shape}.gguf"
    save_gguf(decoder, tokenizer, written, "F32")
    # a router takes up what SiLU loses; a window left out moves a chance by more than 4
    bound = 0.01 if re.match("GPT|Bloom|Falcon", name) else 0.1 if "Mixtral" in name else 0.02
    server = LlamaCpp(written)
    for length in (1, 7, 60):
        prompt = torch.randint(3, tokenizer.size, (length,)).tolist()
        want = ours(decoder, prompt)[-1].log_softmax(-1)
        found = chances(server, prompt, tokenizer.encode("a")[0], 20)
        assert len(found) == 20 and want.std() > 1
        assert max(abs(float(want[id]) - chance) for id, chance in found.items()) <= bound
