"""What many tests need: a book of their own, the real embedded model, shared data, a tiny model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# One thread, here and in the processes that tests start: tiny matrices gain nothing from a second
# one, and where the cores are busy the two wait for each other 10 to 50 times as long. torch reads
# this when it is imported, which no test has done yet; rooms without torch stay without.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DATA = Path(os.environ.get("HERDBOOK_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home; HERDBOOK_HOME points to it."""
    place = tmp_path / "home"
    monkeypatch.setenv("HERDBOOK_HOME", str(place))
    return place


@pytest.fixture
def book(home: Path):
    from herdbook.book.book import Book

    return Book(home)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct, fetched once into the user's cache."""
    from herdbook.model.references import resolve

    return resolve("smollm2", None)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("alpaca/prompt.txt")`: a file of the real data set, or skip where there is none."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"no {name}: set HERDBOOK_DATA to the folder of real data")
        return path

    return find


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA with a byte-level BPE tokenizer, as transformers writes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["user assistant system hello who are you I am a small model 你好 你是谁"] * 4
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter for the tiny model, on disk."""
    import torch

    from herdbook.model.checkpoint import load_decoder
    from herdbook.model.lora import apply_lora
    from herdbook.training import peft_format

    folder = tmp_path_factory.mktemp("adapter")
    decoder = load_decoder(tiny_folder, dtype=torch.float32)
    adapters = apply_lora(decoder, targets=("q", "v", "down"), rank=2, alpha=4.0, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for one in adapters.values():
            one.B.normal_(0, 0.3)
    peft_format.save(decoder, folder, base=str(tiny_folder))
    return folder
