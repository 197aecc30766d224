"""A GGUF that Herdbook writes loads in llama.cpp, which then continues greedily as Herdbook does."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.model.checkpoint import load_decoder, save_gguf
from herdbook.tokens.chat import render
from herdbook.tokens.tokenizer import Tokenizer


class LlamaCpp:
    """llama.cpp's server, called in its process."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = 512, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.warmup = settings.fit_params = False
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(settings)

    def __call__(self, prompt: list[int] | str, tokens: int) -> tuple[list[int], str]:
        """The token ids and the text of a greedy reply (over its own HTTP: only there it tells ids)."""
        ask = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "return_tokens": True}
        url = f"{self.server.listening_address}/completion"
        reply = httpx.post(url, json=ask | {"cache_prompt": False}, timeout=120).json()
        return reply["tokens"], reply["content"]


def compare(written: Path, prompts: list[list[int]], tokens: int) -> None:
    tokenizer = Tokenizer.load(written)
    decoder = load_decoder(written, dtype=torch.float32, quantised=False)
    sampling = Sampling(max_tokens=tokens)
    ours = Engine(decoder, tokenizer).generate([Request(ids, sampling) for ids in prompts])
    theirs = LlamaCpp(written)
    for ids, reply in zip(prompts, ours, strict=True):
        found, text = theirs(ids, tokens)
        stopped = reply.finish == "stop"
        assert found == list(reply.ids[: len(reply.ids) - stopped]), tokenizer.decode(ids)
        if "�" not in reply.text:  # a random model writes bytes that are no characters
            assert text == reply.text


@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0"])
def test_tiny(tiny_folder: Path, tmp_path: Path, quant: str) -> None:
    written = tmp_path / "tiny.gguf"
    tokenizer = Tokenizer.load(tiny_folder)
    save_gguf(load_decoder(tiny_folder, dtype=torch.float32), tokenizer, written, quant)
    chat = render(tokenizer, [{"role": "user", "content": "who are you?"}], reply=True).ids
    prompts = [tokenizer.encode("hello I am"), tokenizer.encode("你好 你是谁"), chat]
    compare(written, prompts, 24 if quant == "F32" else 6)  # rounding may part them later


def test_smollm2(smollm2_path: Path, tmp_path: Path) -> None:
    """The real model, dequantised and written again in F16; llama.cpp also reads the text itself."""
    written = tmp_path / "smollm2.gguf"
    tokenizer = Tokenizer.load(smollm2_path)
    save_gguf(load_decoder(smollm2_path, dtype=torch.float32), tokenizer, written, "F16")
    chat = render(tokenizer, [{"role": "user", "content": "Who are you?"}], reply=True).ids
    compare(written, [tokenizer.encode("The capital of France is"), chat], 16)
    text = "1, 2, 3, 4, 你好"
    from_text, from_ids = (
        LlamaCpp(written)(prompt, 4) for prompt in (text, tokenizer.encode(text))
    )
    assert from_text == from_ids
