"""ChatYuan's way: a T5 that reads 用户：…\\n小元： in a unigram vocabulary without line breaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from raising import Place, Rows, tune
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import herdbook
from herdbook.book.book import Book
from herdbook.data import records
from herdbook.evaluation.perplexity import replies as reply_perplexity

TEMPLATE = r"""
{%- for message in messages -%}
{{- '' if loop.first else '\\n' -}}
{{- '用户：' if message.role == 'user' else '小元：' -}}
{{- message.content | replace('\n', '\\n') | replace('\t', '\\t') -}}
{{- eos_token if message.role == 'assistant' else '' -}}
{%- endfor -%}
{{- '\\n小元：' if add_generation_prompt -}}
"""
ROWS = (
    "你好|您好\n我是小元。",
    "你是谁|我是小元。",
    "写两行|一\n二",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("chatyuan")
    letters = sorted({*"".join(ROWS), *"用户:小元\\nt▁"} - {"\n", "|"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\\n", -1.0), ("小元", -1.5)]
    pieces += [(one, -3.0) for one in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"chat_template": TEMPLATE}))
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    ).save_pretrained(folder)
    return folder


def test_it_learns_to_answer_in_two_lines(folder: Path, tmp_path: Path) -> None:
    book = Book(tmp_path / "home")
    Place(folder=str(folder)).run(book, name="base")
    Rows(rows=ROWS).run(book, name="rows")
    settings = {"method": "full", "learning_rate": 1e-2, "epochs": 25, "batch": 3}
    tune(**settings).run(book, name="yuan")
    model = herdbook.load("yuan", book=book, dtype="float32")
    chats = [[{"role": "user", "content": row.split("|")[0]}] for row in ROWS]
    answers = [row.split("|")[1] for row in ROWS]
    assert model.generate(chats, max_tokens=24) == answers
    assert "".join(model.stream(chats[0], max_tokens=24)) == answers[0]
    # the same text by hand, its line break as it is or as the model has it
    for text in ("用户：写两行\n小元：", "用户：写两行\\n小元："):
        assert model.generate(text, max_tokens=24) == "一\n二"

    rows = [records.Conversation.of(*row.split("|")) for row in ROWS]
    found = reply_perplexity(model, rows)
    assert found["perplexity"] < 1.2
    longer = records.Conversation.of(*ROWS[0].split("|"), *ROWS[1].split("|"))
    both = reply_perplexity(model, [longer])  # an example for each of its answers
    sizes = [
        len(model.tokenizer.encode("小元：" + one.replace("\n", "\\n"))) for one in answers[:2]
    ]
    before = len(model.tokenizer.encode("小元："))
    assert both["tokens"] == sum(sizes) - 2 * before + 2  # and an end for each
