"""Two tokenizers small enough to know every id by heart, one of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from herdbook.tokens.bytebpe import ALPHABET
from herdbook.tokens.sentence import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from herdbook.tokens.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set start = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set start = '' %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (start if loop.first else '') + message['content'].strip() "
    "+ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# The first three ids are special, then the 256 bytes, then the words that merges make.
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["H e", "l l", "He ll", "Hell o", "Ġ Hello", "Ġ w", "o r"]


def byte_metadata(pre: str = "smollm", template: str | None = CHATML) -> dict[str, Any]:
    """tokenizer.* of a GGUF: id(byte b) = 3 + b; He 259, ll 260, Hell 261, Hello 262 …"""
    tokens = [*SPECIALS, *(ALPHABET[b] for b in range(256))]
    tokens += [merge.replace(" ", "") for merge in MERGES]
    out = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    return out | ({"tokenizer.chat_template": template} if template else {})


def piece_metadata(template: str | None = LLAMA2, **changes: Any) -> dict[str, Any]:
    """The same for SentencePiece: <unk> <s> </s>, 256 bytes (id 3 + b), then words."""
    words = ["▁", "h", "i", "a", "b", "▁h", "▁hi", "ab", "ba", "[", "]", "I", "N", "S", "T", "/"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, "<keep>"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [0.0]
    scores[259 + words.index("ab")] = scores[259 + words.index("ba")] = -1.0  # a tie
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words), USER_DEFINED]
    out = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return out | ({"tokenizer.chat_template": template} if template else {}) | changes


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(byte_metadata(), Path("small.gguf"))


@pytest.fixture(scope="session")
def piece_tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(piece_metadata(), Path("small.gguf"))
