"""The families of 2019–2023 against transformers: logits, cached replies, what we save; GGUF.

Tiny random models, as transformers writes them; weights, biases and norms large enough that a wrong
row order, rotation or norm shows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import FamilyError
from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_gguf, save_hf
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Packed

VOCAB = 120
GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
HF: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
NEOX = HF | {"intermediate_size": 96, "max_position_embeddings": 256}
OPT = HF | {"ffn_dim": 96, "max_position_embeddings": 256, "init_std": 0.2}
GROUPS = {"new_decoder_architecture": True, "num_kv_heads": 2}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", GPT),
    "cerebras": ("GPT2LMHeadModel", GPT | {"activation_function": "gelu", "n_inner": 96}),
    "gptj": ("GPTJForCausalLM", GPT | {"rotary_dim": 8}),
    "codegen": ("CodeGenForCausalLM", GPT | {"rotary_dim": 8, "n_head": 8}),
    "codegen-whole": ("CodeGenForCausalLM", GPT | {"rotary_dim": 16}),
    "neox": ("GPTNeoXForCausalLM", NEOX),
    "neox-incite": ("GPTNeoXForCausalLM", NEOX | {"use_parallel_residual": False}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "bloom-6-heads": ("BloomForCausalLM", {"hidden_size": 96, "n_layer": 2, "n_head": 6}),
    "falcon-7b": ("FalconForCausalLM", HF),
    "falcon-40b": ("FalconForCausalLM", HF | GROUPS),
    "falcon-11b": ("FalconForCausalLM", HF | GROUPS | {"num_ln_in_parallel_attn": 1}),
    "falcon-rw": (
        "FalconForCausalLM",
        HF | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "opt": ("OPTForCausalLM", OPT),
    "opt-350m": (
        "OPTForCausalLM",
        OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
}
IN_GGUF = [name for name in SHAPES if re.match("gpt2|neox|bloom|falcon-[^r]", name)]


def make(shape: str, folder: Path) -> Any:
    """A random model saved by transformers; biases and norms made random too."""
    name, settings = SHAPES[shape]
    torch.manual_seed(sum(map(ord, shape)))
    kind = getattr(transformers, name)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = kind.config_class(vocab_size=VOCAB, initializer_range=0.2, **ids, **settings)
    model = kind(config).eval().float()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias") or "norm" in key or "ln_" in key:
                value.add_(torch.randn_like(value) * 0.3)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def ours(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    return decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))


@torch.inference_mode()
def theirs(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def prompt(length: int, seed: int = 7) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_what_we_save(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs", dtype=torch.float32)
    want = theirs(model, prompt(150))
    assert want.std() > 0.5, "the oracle says something"
    assert differ(ours(decoder, prompt(150)), want) <= 1e-4

    save_hf(decoder, None, tmp_path / "ours", torch.float32)
    first, again = (load_file(tmp_path / one / "model.safetensors") for one in ("theirs", "ours"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)

    # written from the axes alone, as after a GGUF
    decoder.source_config = {}
    save_hf(decoder, None, tmp_path / "axes", torch.float32)
    back, report = type(model).from_pretrained(tmp_path / "axes", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert differ(theirs(back.float(), prompt(150)), want) <= 1e-4
    assert open_checkpoint(tmp_path / "axes").config == decoder.config


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_replies(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path)
    prompts = [prompt(length, length) for length in (1, 37, 5, 18)]
    engine = Engine(
        load_decoder(tmp_path, dtype=torch.float32), None, page_tokens=4, max_batch_tokens=16
    )
    sampling = Sampling(max_tokens=12, ignore_eos=True)
    replies = engine.generate([Request(ids, sampling) for ids in prompts])
    for ids, reply in zip(prompts, replies, strict=True):
        whole = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=-1,
        )[0].tolist()
        assert list(reply.ids) == whole[len(ids) :]


@pytest.mark.parametrize("shape", IN_GGUF)
def test_gguf_and_back(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    save_gguf(decoder, None, tmp_path / "model.gguf", "F32")
    back = load_decoder(tmp_path / "model.gguf", dtype=torch.float32)
    assert differ(ours(back, prompt(150)), ours(decoder, prompt(150))) <= 1e-5
    assert back.config == decoder.config
    save_hf(back, None, tmp_path / "hf", torch.float32)
    again = type(model).from_pretrained(tmp_path / "hf").float()
    assert differ(theirs(again, prompt(150)), theirs(model, prompt(150))) <= 1e-4


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - set(IN_GGUF)))
def test_what_llama_cpp_does_not_know_is_refused(shape: str, tmp_path: Path) -> None:
    make(shape, tmp_path)
    with pytest.raises(FamilyError, match="cannot be written as GGUF"):
        save_gguf(load_decoder(tmp_path), None, tmp_path / "model.gguf", "F32")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("shape", ["gpt2", "bloom", "opt-350m"])
def test_a_model_published_without_its_prefix(shape: str, tmp_path: Path) -> None:
    """gpt2 and bloom lie on the hub as the bare model, GPT-2 with its causal masks among the weights."""
    model = make(shape, tmp_path)
    file = tmp_path / "model.safetensors"
    bare = {re.sub(r"^(transformer|model)\.", "", n): t for n, t in load_file(file).items()}
    if shape == "gpt2":
        bare["h.0.attn.bias"] = torch.ones(256, 256).tril().view(1, 1, 256, 256)
        bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, file)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    assert differ(ours(decoder, prompt(40)), theirs(model, prompt(40))) <= 1e-4


def test_falcons_slopes_are_rounded_as_in_its_training(tmp_path: Path) -> None:
    """Past 256 tokens bfloat16 tells neighbours no longer apart: the rounded products count."""
    model = make("falcon-rw", tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    assert differ(ours(decoder, prompt(700)), theirs(model, prompt(700))) <= 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_stays_as_near_as_theirs(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path)
    ids = prompt(60)
    want = theirs(model, ids)
    decoder = load_decoder(tmp_path, dtype=torch.bfloat16)
    peer = theirs(model.bfloat16(), ids).float()
    assert (ours(decoder, ids) - want).abs().mean() <= 1.5 * (peer - want).abs().mean()
    # paged, with ALiBi's bias and masks in bfloat16 too
    sampling = Sampling(max_tokens=4, ignore_eos=True)
    engine = Engine(decoder, None, page_tokens=4, max_batch_tokens=16)
    replies = engine.generate([Request(ids[:n], sampling) for n in (1, 30, 9)])
    assert all(len(reply.ids) == 4 for reply in replies)
