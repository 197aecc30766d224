"""Quantised folders (compressed-tensors) of every family: what is written is read, served and checked.

The library itself and transformers compare in tests/oracles/test_compressed_tensors.py.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herdbook.compression import parity
from herdbook.compression.layers import quantise_layers
from herdbook.engine.engine import Engine
from herdbook.engine.request import Request, Sampling
from herdbook.errors import FamilyError, FileError, GateError
from herdbook.model.checkpoint import (
    load_decoder,
    open_checkpoint,
    save_compressed,
    save_hf,
    tensors,
)
from herdbook.model.decoder import Decoder
from herdbook.model.families import by_source
from herdbook.model.layers import Int4Linear, Int8Linear, Linear
from herdbook.model.layout import Packed
from herdbook.model.lora import TARGETS, apply_lora, merge_lora
from herdbook.model.modules import build

#: GPT-2 keeps its matrices the other way round: GGUF holds it
FIXTURES = {
    path.stem: path
    for path in sorted((Path(__file__).parent / "families").glob("*.json"))
    if not path.stem.startswith("gpt2")
}


def random_of(path: Path) -> Decoder:
    source = json.loads(path.read_text())
    family = by_source(source, "fixture")
    decoder = build(family.config(source, "fixture"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(float("norm" in name and "bias" not in name), 0.2)
    decoder.family = family.name
    return decoder.eval()


def exactly(decoder: Decoder) -> Decoder:
    """Without the kernel that computes in bfloat16."""
    for layer in decoder.modules():
        if isinstance(layer, Int4Linear):
            layer.has_kernel = False
    return decoder


def write(decoder: Decoder, folder: Path, bits: int) -> Decoder:
    """The decoder's rounded twin, written to `folder` in float32."""
    twin = copy.deepcopy(decoder)
    quantise_layers(twin, bits)
    save_compressed(twin, None, folder, lambda name: torch.float32)
    return exactly(twin)


@pytest.fixture(params=[4, 8])
def bits(request: Any) -> int:
    return int(request.param)


@pytest.fixture(params=FIXTURES)
def decoder(request: Any) -> Decoder:
    return random_of(FIXTURES[request.param])


def test_every_family(decoder: Decoder, bits: int, tmp_path: Path) -> None:
    """The codes are read as they were made, dense and kept; logits are those of the dense twin; the
    engine's greedy replies those of plain passes."""
    twin = write(decoder, tmp_path, bits)
    dense = load_decoder(tmp_path, torch.float32)
    kept = exactly(load_decoder(tmp_path, torch.float32, quantised=True))
    for other in (dense, kept):
        for (name, a), (_, b) in zip(
            tensors(twin, torch.float32), tensors(other, torch.float32), strict=True
        ):
            assert torch.equal(a, b), name
    kind = Int4Linear if bits == 4 else Int8Linear
    for place, layer in kept.blocks.named_modules():
        if hasattr(layer, "inputs"):
            stays = layer.inputs % 32 or place.endswith("router")
            assert isinstance(layer, Linear if stays else kind), place
    before, wanted = parity.text_logits(decoder, None), parity.text_logits(dense, None)
    torch.testing.assert_close(parity.text_logits(kept, None), wanted, atol=1e-4, rtol=1e-4)
    near = {4: 0.7, 8: 0.1}[bits] * before.std()
    assert 0 < (wanted - before).abs().median() <= near  # a router may flip
    assert 0 < parity.check_written(decoder, tmp_path, f"int{bits}") <= {4: 0.1, 8: 0.01}[bits]

    dice, marks = random.Random(5), dense.config.prefix
    prompts = [
        [dice.randrange(1, dense.config.vocab) for _ in range(n)]
        + ([marks.whole, marks.start] if marks else [])
        for n in (1, 9, 23)
    ]
    engine = Engine(kept, None, page_tokens=4, pages=64, max_batch_tokens=16)
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    replies = engine.generate([Request(ids, sampling) for ids in prompts])
    for ids, reply in zip(prompts, replies, strict=True):
        whole = dense.prompt(ids)
        for _ in range(6):
            with torch.inference_mode():
                hidden = dense(torch.tensor(whole), Packed([len(whole)]))
                whole.append(int(dense.logits(hidden[-1:]).argmax()))
        assert list(reply.ids) == whole[-6:]


def test_the_kernel_of_4_bits_is_near(tmp_path: Path) -> None:
    write(random_of(FIXTURES["gptj"]), tmp_path, 4)
    kept = load_decoder(tmp_path, torch.float32, quantised=True)
    assert kept.blocks[0].attention.q.has_kernel
    wanted = parity.text_logits(load_decoder(tmp_path, torch.float32), None)
    found = parity.text_logits(kept, None)  # 64 rows: through the kernel, in bfloat16
    assert 0 < (found - wanted).abs().mean() <= 0.05 * wanted.std()


@pytest.mark.parametrize("family", ["codegen", "opt", "switch_transformers", "llama"])
def test_saved_again_it_has_the_same_bytes(family: str, bits: int, tmp_path: Path) -> None:
    write(random_of(FIXTURES[family]), tmp_path / "first", bits)
    again = load_decoder(tmp_path / "first", torch.float32, quantised=True)
    done = quantise_layers(again, bits)
    assert done.exact == done.matrices > 0 and done.share == 0
    save_compressed(again, None, tmp_path / "again", open_checkpoint(tmp_path / "first").dtype)
    a, b = (tmp_path / name / "model.safetensors" for name in ("first", "again"))
    assert a.read_bytes() == b.read_bytes()
    configs = [json.loads((p.parent / "config.json").read_text()) for p in (a, b)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("family", ["gptj", "t5", "rwkv"])
def test_adapters_on_it(family: str, bits: int, tmp_path: Path) -> None:
    """An adapter sits on the dequantised matrices; merged and saved, it is a plain folder."""
    write(random_of(FIXTURES[family]), tmp_path / "quantised", bits)
    base = load_decoder(tmp_path / "quantised", torch.float32)
    untuned = parity.text_logits(base, None)
    for adapter in apply_lora(base, targets=TARGETS, rank=2, alpha=4).values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    tuned = parity.text_logits(base, None).detach()
    assert (tuned - untuned).abs().max() > 0.01
    merge_lora(base)
    save_hf(base, None, tmp_path / "merged", torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    found = parity.text_logits(load_decoder(tmp_path / "merged", torch.float32), None)
    torch.testing.assert_close(found, tuned, atol=1e-3, rtol=1e-3)


def test_gpt_2_is_refused(tmp_path: Path) -> None:
    decoder = random_of(Path(__file__).parent / "families" / "gpt2.json")
    with pytest.raises(FamilyError, match=r"\[in, out\] there.*\n.*Q4_1"):
        write(decoder, tmp_path, 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, bits: int) -> None:
    decoder = random_of(FIXTURES["opt"])
    with torch.no_grad():
        decoder.blocks[1].mlp.up.weight[3, 5] = value
    with pytest.raises(GateError, match=r"mlp\.up is off by"):
        quantise_layers(decoder, bits)


def test_tiny_and_empty_groups(bits: int, tmp_path: Path) -> None:
    """Scales below float16's, and groups of nothing but zeros."""
    decoder = random_of(FIXTURES["opt"])
    with torch.no_grad():
        decoder.blocks[0].mlp.up.weight.mul_(1e-7)
        decoder.blocks[1].mlp.up.weight[2] = 0
    twin = write(decoder, tmp_path, bits)
    kept = load_decoder(tmp_path, torch.float32, quantised=True)
    dense = load_decoder(tmp_path, torch.float32)
    for number in (0, 1):
        a, b, c = (one.blocks[number].mlp.up.dense(torch.float32) for one in (twin, kept, dense))
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not a[2].any()
    parity.check_written(decoder, tmp_path, f"int{bits}")


# --- hostile -----------------------------------------------------------------------------------------

UP = "transformer.h.1.mlp.fc_in."
Held = dict[str, Tensor]


def edit(folder: Path, change: Callable[[Held], None]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file({name: one.contiguous() for name, one in held.items()}, folder / "model.safetensors")


def swap(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[Held], None]:
    return lambda held: held.update({UP + leaf: change(held[UP + leaf])})


DAMAGED: dict[str, Callable[[Held], Any]] = {
    "no scale": lambda held: held.pop(UP + "weight_scale"),
    "no zero points": lambda held: held.pop(UP + "weight_zero_point"),
    "no shape": lambda held: held.pop(UP + "weight_shape"),
    "a shape of three": swap("weight_shape", lambda t: torch.tensor([1, 2, 3])),
    "a huge shape": swap("weight_shape", lambda t: torch.tensor([2**62, 2**62])),
    "a shape of nothing": swap("weight_shape", lambda t: t * 0),
    "a negative shape": swap("weight_shape", lambda t: -t),
    "another shape": swap("weight_shape", lambda t: t.flip(0)),
    "a real shape": swap("weight_shape", lambda t: t.float()),
    "fewer rows": swap("weight_packed", lambda t: t[1:]),
    "fewer columns": swap("weight_packed", lambda t: t[:, 1:]),
    "three axes": swap("weight_packed", lambda t: t[None]),
    "codes as bytes": swap("weight_packed", lambda t: t.view(torch.uint8)),
    "real codes": swap("weight_packed", lambda t: t.float()),
    "scales for half the groups": swap("weight_scale", lambda t: t[:, ::2]),
    "whole scales": swap("weight_scale", lambda t: t.to(torch.int32)),
    "unpacked zero points": swap("weight_zero_point", lambda t: t.repeat(8, 1).to(torch.int8)),
    "an order of inputs": lambda held: held.update({UP + "weight_g_idx": torch.arange(64)}),
    "dense as well": lambda held: held.update({UP + "weight": torch.ones(256, 64)}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_tensors(damage: str, tmp_path: Path) -> None:
    write(random_of(FIXTURES["gptj"]), tmp_path, 4)
    edit(tmp_path, DAMAGED[damage])
    with pytest.raises(FileError, match=r"transformer\.h\.1\.mlp\.fc_in") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.next


def weights(**changes: Any) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    return {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": base | {"group_size": 32, "dynamic": False} | changes,
            }
        }
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "gptq"}, "quant_method 'gptq' and Herdbook reads"),
    "another format": ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    "no groups": ({"config_groups": {}}, "config_groups"),
    "groups of a list": ({"config_groups": [1]}, "config_groups"),
    "a preset": ({"config_groups": {"W4A16": ["Linear"]}}, r"config_groups. \"\['Linear'\]"),
    "no weights": ({"config_groups": {"a": {"targets": []}}}, "weights. 'None'"),
    "3 bits": (weights(num_bits=3), "weights.num_bits '3' and Herdbook reads only 4, 8"),
    "bits of a flag": (weights(num_bits=True), "weights.num_bits"),
    "reals": (weights(type="float"), "weights.type 'float'"),
    "small groups": (
        weights(group_size=16),
        "weights.group_size '16' and Herdbook reads multiples",
    ),
    "no group": (weights(group_size=None), "weights.group_size 'None'"),
    "another group": (weights(group_size=64), "is no matrix .* that its quantization_config names"),
    "symmetric": (weights(symmetric=True), "is no matrix"),
    "8 bits with zero points": (weights(num_bits=8), "weights.symmetric 'False'"),
    "per tensor": (weights(strategy="tensor"), "weights.strategy 'tensor'"),
    "an order": (weights(actorder="group"), "weights.actorder 'group'"),
    "an unknown key": (weights(turned=True), "weights.turned 'True'"),
    "activations": (
        {"config_groups": {"a": {"weights": {}, "input_activations": {"num_bits": 8}}}},
        "config_groups.input_activations",
    ),
    "a cache": ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "sparse": ({"sparsity_config": {"format": "marlin"}}, "sparsity_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_layouts(case: str, tmp_path: Path) -> None:
    write(random_of(FIXTURES["gptj"]), tmp_path, 4)
    changes, message = REFUSED[case]
    path = tmp_path / "config.json"
    source = json.loads(path.read_text())
    source["quantization_config"] |= changes
    path.write_text(json.dumps(source))
    with pytest.raises(FileError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.next


@pytest.mark.parametrize("value", [3, "int4", [1], True])
def test_a_config_that_is_none(value: Any, tmp_path: Path) -> None:
    write(random_of(FIXTURES["gptj"]), tmp_path, 4)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": value}))
    with pytest.raises(FileError, match="but must be a mapping"):
        open_checkpoint(tmp_path)


def test_packed_tensors_without_their_config(tmp_path: Path) -> None:
    write(random_of(FIXTURES["gptj"]), tmp_path, 4)
    path = tmp_path / "config.json"
    source = json.loads(path.read_text())
    del source["quantization_config"]
    path.write_text(json.dumps(source))
    with pytest.raises(FileError, match=r"q_proj\.weight' is missing"):
        open_checkpoint(tmp_path)
