"""Folders and files opened, refused, saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from herdbook.errors import FamilyError, FileError
from herdbook.files import gguf
from herdbook.model import layers
from herdbook.model.checkpoint import (
    INDEX,
    check_vocabulary,
    load_decoder,
    open_checkpoint,
    save_gguf,
    save_hf,
)
from herdbook.model.decoder import Decoder
from herdbook.model.layers import Int4Linear, Int8Linear
from herdbook.model.layout import Packed
from herdbook.tokens.tokenizer import Tokenizer


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder: Path, change: Any) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")


@torch.inference_mode()
def logits(decoder: Decoder) -> torch.Tensor:
    return decoder.logits(decoder(torch.arange(3, 40), Packed([37])))


def test_opened_without_reading_a_weight(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.family.model_type == "llama"
    assert (checkpoint.config.hidden, checkpoint.config.kv_heads) == (64, 2)
    assert checkpoint.config.tied and not checkpoint.headless
    decoder = load_decoder(folder, dtype=torch.float32)
    assert decoder.head is None and decoder.head_weight is decoder.embed.weight
    assert not any(p.requires_grad for p in decoder.parameters())
    assert decoder.parameter_count() == sum(p.numel() for p in decoder.parameters())


def test_missing_left_over_and_misshapen_tensors(folder: Path) -> None:
    weights(folder, lambda held: held.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(FileError, match=r"'model.layers.1.mlp.up_proj.weight' is missing"):
        open_checkpoint(folder)
    weights(folder, lambda h: h.update({"model.layers.1.mlp.up_proj.weight": torch.ones(160, 9)}))
    with pytest.raises(
        FileError, match=r"has the shape \[160, 9\] but the config asks for \[160, 64"
    ):
        open_checkpoint(folder)
    weights(folder, lambda h: h.update({"model.layers.1.mlp.up_proj.weight": torch.ones(160, 64)}))
    open_checkpoint(folder)
    weights(folder, lambda h: h.update({"model.layers.7.mlp.up_proj.weight": torch.ones(160, 64)}))
    with pytest.raises(FileError, match=r"'model.layers.7.mlp.up_proj.weight' has no place"):
        open_checkpoint(folder)


def test_old_rotary_buffers_are_left_aside(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights(folder, lambda held: held.update({name: torch.ones(8)}))
    open_checkpoint(folder)


def test_a_tied_head_may_be_saved_but_not_differ(folder: Path) -> None:
    weights(folder, lambda h: h.update({"lm_head.weight": h["model.embed_tokens.weight"].clone()}))
    load_decoder(folder)
    weights(folder, lambda h: h["lm_head.weight"].add_(1))
    with pytest.raises(
        FileError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"
    ):
        open_checkpoint(folder)
    edit(folder, tie_word_embeddings=False)
    assert load_decoder(folder).head is not None


def test_without_head(folder: Path) -> None:
    edit(folder, tie_word_embeddings=False)
    decoder = load_decoder(folder, dtype=torch.float32)
    assert decoder.headless and decoder(torch.arange(5), Packed([5])).shape == (5, 64)
    for use in (lambda: decoder.logits(torch.ones(1, 64)), lambda: decoder.head_weight):
        with pytest.raises(FileError, match="this model has no head"):
            use()
    save_hf(decoder, None, folder / "again", torch.float32)
    assert open_checkpoint(folder / "again").headless
    with pytest.raises(FileError, match="this model has no head"):
        save_gguf(decoder, None, folder / "m.gguf", "F32")


def test_broken_configs(folder: Path) -> None:
    edit(folder, model_type="gpt9")
    with pytest.raises(FamilyError, match="'gpt9' is not one of the families"):
        open_checkpoint(folder)
    for text, reason in (("{", "is no JSON"), ("[]", "holds no JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(FileError, match=reason):
            open_checkpoint(folder)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is not there"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileError, match="holds no model"):
        open_checkpoint(tmp_path)
    (tmp_path / "README.md").touch()
    with pytest.raises(
        FileError, match=r"no config\.json with \.safetensors or pytorch_model\.bin"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileError, match="it is no whole file of pickled weights"):
        open_checkpoint(tmp_path)


def test_a_broken_weight_file_is_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(FileError, match=r"model.safetensors: its tensors end at byte"):
        load_decoder(folder)


def test_shards_that_lie_outside_or_lie(folder: Path) -> None:
    decoder = load_decoder(folder, dtype=torch.float32)
    save_hf(decoder, None, folder / "s", torch.float32, shard_bytes=100_000)
    index = folder / "s" / INDEX
    good = json.loads(index.read_text())
    assert good["metadata"]["total_size"] == 4 * decoder.parameter_count()
    assert torch.equal(logits(load_decoder(folder / "s", dtype=torch.float32)), logits(decoder))

    first = next(iter(good["weight_map"]))
    for file in ("../model.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin", 3):
        bad = good | {"weight_map": good["weight_map"] | {first: file}}
        index.write_text(json.dumps(bad))
        with pytest.raises(FileError, match="but shards lie beside the index"):
            open_checkpoint(folder / "s")
    last = max(good["weight_map"].values())
    index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {"other": last}}))
    with pytest.raises(
        FileError, match=f"puts tensor 'other' into {last} but it does not lie there"
    ):
        open_checkpoint(folder / "s")
    index.write_text("{}")
    with pytest.raises(FileError, match="has no weight_map"):
        open_checkpoint(folder / "s")


def test_the_same_bytes_each_time_and_the_sources_own_keys(folder: Path) -> None:
    edit(folder, unsloth_version="2026.1")
    decoder = load_decoder(folder, dtype=torch.float32)
    for name in ("a", "b"):
        save_hf(decoder, Tokenizer.load(folder), folder / name, torch.bfloat16)
    names = sorted(path.name for path in (folder / "a").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()
    source, saved = (json.loads((f / "config.json").read_text()) for f in (folder, folder / "a"))
    assert saved == source | {"dtype": "bfloat16"}


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 60_000])
@pytest.mark.parametrize("most", [torch.float16, torch.bfloat16, torch.float32])
def test_saved_back_with_the_sources_bytes(
    most: torch.dtype, shard_bytes: int, folder: Path, tmp_path: Path
) -> None:
    """Names, types, bytes; norms in another type than matrices, as some checkpoints have them."""
    held = load_file(folder / "model.safetensors")
    held = {name: t.to(most if t.ndim > 1 else torch.float32) for name, t in held.items()}
    save_file(held, folder / "model.safetensors")
    edit(folder, dtype=str(most).removeprefix("torch."))
    decoder, source = load_decoder(folder, dtype=torch.float32), open_checkpoint(folder)
    save_hf(decoder, None, tmp_path / "again", source.dtype, shard_bytes)

    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 100_000)
    saved: dict[str, torch.Tensor] = {}
    for file in files:
        some = load_file(file)
        assert sum(t.nbytes for t in some.values()) <= max(
            shard_bytes, max(t.nbytes for t in some.values())
        )
        saved |= some
    assert saved.keys() == held.keys()
    for name, tensor in held.items():
        assert saved[name].dtype == tensor.dtype, name
        assert torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8)), name
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]
    if len(files) > 1:
        index = json.loads((tmp_path / "again" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values())
        assert index["weight_map"].keys() == held.keys()


def test_grown_vocabulary_is_written_as_it_is_now(folder: Path) -> None:
    import dataclasses

    decoder = load_decoder(folder, dtype=torch.float32)
    decoder.config = dataclasses.replace(decoder.config, vocab=400)
    grown = torch.cat([decoder.embed.weight.data, torch.zeros(16, 64)])
    decoder.embed.weight = torch.nn.Parameter(grown)
    save_hf(decoder, None, folder / "grown", torch.float32)
    again = load_decoder(folder / "grown", dtype=torch.float32)
    assert again.config == decoder.config and torch.equal(logits(again), logits(decoder))


def test_vocabulary_check(folder: Path) -> None:
    config = open_checkpoint(folder).config
    check_vocabulary(config, 384)
    check_vocabulary(config, 300)
    with pytest.raises(FileError) as caught:
        check_vocabulary(config, 1385)
    assert "1,385 ids but the model's embedding has only 384 rows" in str(caught.value)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_dequantised_and_quantised(
    quant: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "INT4_KERNEL_ROWS", 0)  # the exact path; the kernel: test_layers
    decoder = load_decoder(folder, dtype=torch.float32)
    path = folder / "m.gguf"
    save_gguf(decoder, Tokenizer.load(folder), path, quant)
    dense = load_decoder(path, dtype=torch.float32)
    kept = load_decoder(path, dtype=torch.float32, quantised=True)
    kinds = {"Q8_0": Int8Linear, "Q4_0": Int4Linear, "Q4_1": Int4Linear}
    if quant in kinds:
        assert isinstance(kept.blocks[2].attention.k, kinds[quant])
    torch.testing.assert_close(logits(kept), logits(dense), atol=1e-4, rtol=1e-4)
    near = {"F16": 0.01, "BF16": 0.1, "Q8_0": 0.1, "Q4_0": 1.5, "Q4_1": 1.0}[quant]
    assert (logits(dense) - logits(decoder)).abs().mean() <= near * logits(decoder).std()
    assert Tokenizer.load(path).encode("hello 你好") == Tokenizer.load(folder).encode("hello 你好")

    # what a quantised decoder is saved as is what it stands for
    save_hf(kept, None, folder / "hf", torch.float32)
    assert torch.equal(logits(load_decoder(folder / "hf", dtype=torch.float32)), logits(dense))


def test_gguf_with_more_rows_than_tokens_is_padded(folder: Path, tmp_path: Path) -> None:
    weights(folder, lambda h: h.update({"model.embed_tokens.weight": torch.ones(390, 64)}))
    edit(folder, vocab_size=390)
    tokenizer = Tokenizer.load(folder)
    save_gguf(load_decoder(folder), tokenizer, tmp_path / "m.gguf", "F16")
    tokens = gguf.read(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 390 and len(set(tokens)) == 390


def test_gguf_that_is_no_language_model(tmp_path: Path) -> None:
    gguf.write(tmp_path / "v.gguf", {"general.architecture": "llama"}, [])
    with pytest.raises(FileError, match=r"tensor 'token_embd.weight' is missing so it is no"):
        open_checkpoint(tmp_path / "v.gguf")
    gguf.write(tmp_path / "c.gguf", {"general.architecture": "clip"}, [])
    with pytest.raises(FamilyError, match="architecture 'clip' is not one of those"):
        open_checkpoint(tmp_path / "c.gguf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"llama.expert_count": 8}, "the key 'num_local_experts'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8 but a head has 16"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
        ({"llama.attention.logit_softcap": 50.0}, "the key 'attention.logit_softcap'"),
        ({"llama.attention.head_count_kv": [2, 2, 2]}, "different numbers of heads"),
    ],
)
def test_gguf_metadata_that_would_change_the_result(
    change: dict[str, Any], reason: str, folder: Path
) -> None:
    decoder = load_decoder(folder)
    save_gguf(decoder, None, folder / "m.gguf", "F32")
    file = gguf.read(folder / "m.gguf")
    tensors = [(name, t.type, file.array(name)) for name, t in file.tensors.items()]
    gguf.write(folder / "n.gguf", file.metadata | change, tensors)
    with pytest.raises(FamilyError, match=reason):
        open_checkpoint(folder / "n.gguf")


def test_an_unmerged_adapter_is_not_saved(folder: Path) -> None:
    from herdbook.model.lora import LoRALinear

    decoder = load_decoder(folder, dtype=torch.float32)
    attention = decoder.blocks[0].attention
    attention.q = LoRALinear(attention.q, 2, 4.0)
    with pytest.raises(AssertionError, match="merge it first"):
        save_hf(decoder, None, folder / "x", torch.float32)
