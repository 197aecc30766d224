"""Our decoder against transformers, in float32: the same logits for a tiny random model of each shape.

The prompts are longer than the windows and the original contexts of the scaled rotations, and the
weights are large (0.3), so that a wrong frequency, mask or norm shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from herdbook.model.checkpoint import load_decoder, open_checkpoint, save_gguf, save_hf
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Packed

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-scaling": ("Llama", {"rope_theta": 500_000.0, "rope_scaling": LLAMA3}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("Llama", {"rope_scaling": YARN}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}
#: those that GGUF cannot say, by design: layers that differ in their windows
NOT_IN_GGUF = {"qwen2-windows"}


def make(shape: str, folder: Path) -> Any:
    """A random model saved by transformers; biases and norms made random too."""
    name, settings = SHAPES[shape]
    torch.manual_seed(sum(map(ord, shape)))
    config = getattr(transformers, name + "Config")(**(SIZES | settings))
    model = getattr(transformers, name + "ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                value.add_(torch.randn_like(value) * 0.3)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def ours(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    return decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))


@torch.inference_mode()
def theirs(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def prompt(length: int = 150) -> list[int]:
    return torch.randint(0, 120, (length,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_are_those_of_transformers(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path)
    want = theirs(model, prompt())
    got = ours(load_decoder(tmp_path, dtype=torch.float32), prompt())
    assert got.dtype == torch.float32 and got.shape == (150, 120)
    assert want.std() > 0.5, "the oracle says something"
    assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_what_we_save_loads_in_transformers(shape: str, tmp_path: Path) -> None:
    model = make(shape, tmp_path / "theirs")
    decoder = load_decoder(tmp_path / "theirs", dtype=torch.float32)
    save_hf(decoder, None, tmp_path / "ours", torch.float32, shard_bytes=60_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1, "it is sharded"
    again, report = type(model).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(theirs(again.float(), prompt(40)), theirs(model, prompt(40)))
    back = load_decoder(tmp_path / "ours", dtype=torch.float32)
    assert torch.equal(ours(back, prompt(40)), ours(decoder, prompt(40)))
    assert back.config == decoder.config


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - NOT_IN_GGUF))
def test_gguf_and_back(shape: str, tmp_path: Path) -> None:
    make(shape, tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    save_gguf(decoder, None, tmp_path / "model.gguf", "F32")
    back = load_decoder(tmp_path / "model.gguf", dtype=torch.float32)
    assert (ours(back, prompt()) - ours(decoder, prompt())).abs().max() <= 1e-5
    # and from there to a Hugging Face folder that transformers reads
    save_hf(back, None, tmp_path / "hf", torch.float32)
    name, _ = SHAPES[shape]
    model = getattr(transformers, name + "ForCausalLM").from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    )
    assert (theirs(model.float(), prompt()) - ours(decoder, prompt())).abs().max() <= 1e-4


def test_a_base_model_without_prefix_and_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).eval()
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    ids = prompt(20)
    with torch.inference_mode():
        want = model(torch.tensor([ids])).last_hidden_state[0]
        assert (decoder(torch.tensor(ids), Packed([20])) - want).abs().max() <= 1e-4
    assert open_checkpoint(tmp_path).headless


def test_bfloat16_stays_near(tmp_path: Path) -> None:
    """Norms and softmax in float32: bfloat16 logits stay near float32's, as near as transformers'."""
    model = make("qwen3", tmp_path)
    want = theirs(model, prompt(30))
    got = ours(load_decoder(tmp_path, dtype=torch.bfloat16), prompt(30))
    peer = theirs(model.bfloat16(), prompt(30)).float()
    assert (got - want).abs().mean() <= 1.5 * (peer - want).abs().mean()
