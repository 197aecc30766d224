"""A model with another vocabulary: rows kept, made and left out, on a tiny LLaMA with SentencePiece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from herdbook.book.book import Book
from herdbook.errors import ConfigError, FileError, UnknownName
from herdbook.files.atomic import write_bytes
from herdbook.model import vocabulary
from herdbook.model.checkpoint import load_decoder
from herdbook.model.layout import Packed
from herdbook.model.vocabulary import Refit, mean_rows
from herdbook.tokens import train
from herdbook.tokens.corpus import Corpus
from herdbook.tokens.tokenizer import Tokenizer

ENGLISH = """Tyger Tyger, burning bright, in the forests of the night;
What immortal hand or eye, could frame thy fearful symmetry?
In what distant deeps or skies, burnt the fire of thine eyes?
On what wings dare he aspire? What the hand, dare seize the fire?
"""
CHINESE = "床前明月光疑是地上霜举头望明月低头思故乡\n明月几时有把酒问青天明月光明月\n" * 4
ROWS, SIZE = 352, 340  # of the embedding, of the tokenizer: some rows are spare
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA with a head of its own, in bfloat16, and a SentencePiece tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    train.train(Corpus(texts=[ENGLISH]), "bpe", SIZE, folder).save(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=[2, 300],
        pad_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "chinese.model"
    write_bytes(path, train._pieces(Corpus(texts=[CHINESE]), "unigram", 285))
    return path


@torch.inference_mode()
def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    decoder = load_decoder(folder, torch.float32)
    return decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))


def test_extended(book: Book, llama: Path, pieces: Path) -> None:
    made = vocabulary.extend(str(llama), str(pieces), book, name="zh")
    tokenizer = Tokenizer.load(made.path)
    before, after = (
        load_file(llama / "model.safetensors"),
        load_file(made.path / "model.safetensors"),
    )
    size = tokenizer.size
    assert (made.kind, made.name) == ("model", "zh")
    assert made.metrics["vocabulary"] == size == SIZE + made.metrics["new_rows"]
    assert made.metrics["vocabulary_before"] == ROWS
    # the library itself says what the old pieces are; "|" keeps its space away from the piece
    library = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    bar = library.encode("|")
    for name in (EMBED, HEAD):
        assert after[name].shape == (size, 32) and after[name].dtype == torch.bfloat16
        assert torch.equal(after[name][:SIZE], before[name][:SIZE])
        for id in range(SIZE, size):
            piece = tokenizer.token_bytes(id).decode()
            old = library.encode("|" + piece)
            assert old[: len(bar)] == bar
            mean = before[name][old[len(bar) :]].float().mean(0).to(torch.bfloat16)
            assert torch.equal(after[name][id], mean), piece
    for name in before.keys() - {EMBED, HEAD}:
        assert torch.equal(before[name], after[name]), name
    config = json.loads((made.path / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"]) == (size, 1)
    assert config["eos_token_id"] == [2, 300]
    # what the model says of old tokens has not changed
    ids = Tokenizer.load(llama).encode("What the hand, dare seize the fire?")
    assert torch.equal(logits(llama, ids)[:, :SIZE], logits(made.path, ids)[:, :SIZE])
    assert len(tokenizer.encode("明月光")) < len(Tokenizer.load(llama).encode("明月光"))
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    ids = tokenizer.encode("床前明月光", bos=True)
    with torch.inference_mode():
        expected = peer(torch.tensor([ids])).logits[0]
    assert torch.allclose(logits(made.path, ids), expected, atol=1e-5)


def test_pruned(book: Book, llama: Path, tmp_path: Path) -> None:
    """The same pieces on the text, and on them the same logits, bit for bit."""
    text = "the fire of the night\nburning eyes"
    (tmp_path / "mine.txt").write_text(text)
    made = vocabulary.prune(str(llama), [str(tmp_path / "mine.txt")], book)
    before, after = Tokenizer.load(llama), Tokenizer.load(made.path)
    assert made.name == f"{book.find(made.parents[0]).name}-pruned"
    assert made.metrics["vocabulary"] == after.size < before.size
    assert made.metrics["weights_bytes"] < made.metrics["weights_before_bytes"]
    assert made.metrics["format"] == "bfloat16"
    assert made.metrics["parameters_before"] - made.metrics["parameters"] == 2 * 32 * (
        ROWS - after.size
    )
    old, new = (
        json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        for folder in (llama, made.path)
    )
    keep = [old[piece] for piece in sorted(new, key=new.__getitem__)]
    for one in (text, *text.split("\n")):
        ids, fewer = before.encode(one, bos=True), after.encode(one, bos=True)
        assert [keep[id] for id in fewer] == ids
        assert torch.equal(logits(made.path, fewer), logits(llama, ids)[:, keep])
    config = json.loads((made.path / "config.json").read_text())
    assert config["eos_token_id"] == [2]  # 300 was an ordinary token that went
    assert after.stop_ids == {2}
    assert after.decode(after.encode("something else entirely, 床前")) == (
        "something else entirely, 床前"
    )


def test_pruned_ids_move(book: Book, tiny_folder: Path, tmp_path: Path) -> None:
    """Byte-level BPE with a tied head and a chat template, whose tokens stay."""
    from herdbook.tokens.chat import render

    (tmp_path / "mine.txt").write_text("hello 你好")
    made = vocabulary.prune(str(tiny_folder), [str(tmp_path / "mine.txt")], book, name="tiny")
    before, after = Tokenizer.load(tiny_folder), Tokenizer.load(made.path)
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "你好"}]
    ids, fewer = render(before, talk).ids, render(after, talk).ids
    assert list(map(after.token_bytes, fewer)) == list(map(before.token_bytes, ids))
    keep = {id: new for new, id in zip(fewer, ids, strict=True)}
    old, new = logits(tiny_folder, ids), logits(made.path, fewer)
    for id, place in keep.items():
        assert torch.equal(old[:, id], new[:, place])
    assert load_decoder(made.path).head is None
    config = json.loads((made.path / "config.json").read_text())
    assert config["eos_token_id"] == after.eos_id
    assert after.stop_ids == {after.eos_id, after.encode("<|endoftext|>", specials=True)[0]}


def test_a_gguf_is_refitted_in_float32(book: Book, tiny_folder: Path, tmp_path: Path) -> None:
    from herdbook.model.checkpoint import save_gguf

    path = tmp_path / "q.gguf"
    save_gguf(load_decoder(tiny_folder, torch.float32), Tokenizer.load(tiny_folder), path, "Q8_0")
    (tmp_path / "mine.txt").write_text("hello")
    made = vocabulary.prune(str(path), [str(tmp_path / "mine.txt")], book)
    assert made.metrics["format"] == "float32"
    ids = Tokenizer.load(path).encode("hello")
    fewer = Tokenizer.load(made.path).encode("hello")
    place = [(old, new) for old, new in zip(ids, fewer, strict=True)]
    for old, new in place:
        assert torch.equal(logits(path, ids)[:, old], logits(made.path, fewer)[:, new])


def test_a_vocabulary_of_another_kind(book: Book, llama: Path, tiny_folder: Path) -> None:
    """A model can take any tokenizer: its rows are made of what its own would have written."""
    vocabulary.bring(str(llama), book)
    model = vocabulary.bring(str(tiny_folder), book)
    made = Refit(model=model.id, tokenizer=book.entries("model")[0].id).run(book)
    tokenizer = Tokenizer.load(made.path)
    embed = load_decoder(made.path, torch.float32).embed.weight
    old = load_decoder(tiny_folder, torch.float32).embed.weight
    names = Tokenizer.load(tiny_folder)
    assert tokenizer.size == SIZE == len(embed)
    (the,) = (id for id in range(SIZE) if tokenizer.token_bytes(id) == b" the")
    expected = old[names.encode(" the")]
    assert len(expected) > 1
    assert torch.equal(embed[the], expected.mean(0))
    (byte,) = (id for id in range(names.size) if names.token_bytes(id) == b"\xe4")
    assert torch.equal(embed[3 + 0xE4], old[byte])


def test_mean_rows() -> None:
    matrix = torch.arange(8.0).view(4, 2)
    found = mean_rows(matrix, [[2], [0, 1], [], [3]])
    assert found.tolist() == [[4, 5], [1, 2], [3, 4], [6, 7]]
    bias = mean_rows(torch.tensor([1.0, 2.0, 4.0]), [[2], [0, 1]])
    assert bias.tolist() == [4.0, 1.5]


def test_tokenizers_alone(book: Book, llama: Path, pieces: Path, tmp_path: Path) -> None:
    """Without weights, only a tokenizer is made."""
    alone = tmp_path / "tokenizer.model"
    alone.write_bytes((llama / "tokenizer.model").read_bytes())
    made = vocabulary.extend(str(alone), str(pieces), book)
    assert (made.kind, made.name) == ("tokenizer", "tokenizer-extended")
    (tmp_path / "mine.txt").write_text("the fire")
    fewer = vocabulary.prune("tokenizer-extended", [str(tmp_path / "mine.txt")], book)
    assert (fewer.kind, fewer.name) == ("tokenizer", "tokenizer-extended-pruned")
    assert vocabulary.tokenizer_of("tokenizer-extended", book).size == made.metrics["vocabulary"]
    assert vocabulary.tokenizer_of(str(alone), book).size == SIZE


def test_what_cannot_be(book: Book, llama: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is no SentencePiece model"):
        vocabulary.extend(str(tiny_folder), str(llama), book)
    with pytest.raises(UnknownName, match="'nobody' is no model and no tokenizer"):
        vocabulary.bring("nobody", book)
    (tmp_path / "x.txt").write_text("<html>")
    with pytest.raises(FileError, match="is no line of an RWKV vocabulary"):
        vocabulary.bring(str(tmp_path / "x.txt"), book)
    with pytest.raises(ConfigError, match="has no text"):
        vocabulary.prune(str(llama), [], book)
    with pytest.raises(ConfigError, match="is a model where a text file or a dataset"):
        vocabulary.split([book.entries("model")[0].ref], book)
    with pytest.raises(ConfigError, match="tokenizer is empty"):
        Refit(model="x").check()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("")
    book.add(
        tmp_path / "rows",
        kind="dataset",
        name="rows",
        parents=[],
        step="test",
        key="k",
        config={},
        metrics={},
        versions={},
    )
    with pytest.raises(ConfigError, match="rows is a dataset and neither a model nor a tokenizer"):
        vocabulary.bring("rows", book)
    assert vocabulary.split(["a.txt", "rows"], book) == (("a.txt",), (book.get("rows").id,))
