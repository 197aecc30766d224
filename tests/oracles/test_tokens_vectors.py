"""Token ids against llama.cpp's own vectors, and SentencePiece against its own library."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from herdbook.tokens.tokenizer import Tokenizer

SharedData = Callable[[str], Path]
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "qwen2", "falcon", "gpt-2"])
def test_llama_cpp_vectors(name: str, shared_data: SharedData) -> None:
    path = shared_data(f"tokenizers/gguf/ggml-vocab-{name}.gguf")
    tokenizer = Tokenizer.load(path)
    cases = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    lines = Path(f"{path}.out").read_text().split("\n")
    assert len(cases) == len(lines) > 40
    for text, line in zip(cases, lines, strict=True):
        ids = [int(one) for one in line.split()]
        assert tokenizer.encode(text) == ids, text
        found, spans = tokenizer.encode_spans(text)
        assert found == ids, text
        assert len(spans) == len(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["llama", "chinese_llama2_merged", "internlm", "chinese_sp"])
def test_sentencepiece_models(name: str, shared_data: SharedData) -> None:
    """The .model file, and the GGUF metadata made of it, encode as the library itself does."""
    path = shared_data(f"tokenizers/{name}.model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = [Tokenizer.load(path)]
    if name != "chinese_sp":  # its normaliser (NFKC) has no place in a GGUF of kind llama
        ours.append(Tokenizer.from_gguf(ours[0].gguf_metadata(), path))
    draw = random.Random(0)
    words = [
        "the",
        "llama",
        "aaaa",
        "",
        "中国人民共和国",
        "大语言模型",
        "🦙",
        "é",
        "\n\t",
        "3.14",
        "<s>",
        "ab▁c",
    ]
    for _ in range(300):
        text = " ".join(draw.choices(words, k=draw.randint(0, 8)))
        expected = library.encode(text)
        for tokenizer in ours:
            assert tokenizer.encode(text) == expected, text
            ids, spans = tokenizer.encode_spans(text.replace("<s>", ""))
            assert ids == library.encode(text.replace("<s>", ""))
            assert all(0 <= a <= b <= len(text) for a, b in spans)


def test_tokenizer_json_made_of_llama_scores(shared_data: SharedData, tmp_path: Path) -> None:
    """BPE merges by score give the same ids as SentencePiece on LLaMA's vocabulary."""
    original = Tokenizer.load(shared_data("tokenizers/llama.model"))
    original.save(tmp_path)
    merged = Tokenizer.load(tmp_path)
    text = shared_data("text/tinyshakespeare.txt").read_text(encoding="utf-8")[:30_000]
    poems = shared_data("text/tang300.jsonl").read_text(encoding="utf-8")[:10_000]
    draw = random.Random(1)
    odd = ["".join(draw.choices("aab  l\n我是é🦙1", k=draw.randint(1, 30))) for _ in range(500)]
    for one in [text, poems, *odd]:
        assert merged.encode(one) == original.encode(one), one[:80]
        assert merged.decode(merged.encode(one)) == one
