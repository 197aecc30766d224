"""What holds for every description: its names are a bijection, packing is undone, a checkpoint comes back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from herdbook.errors import FamilyError
from herdbook.model.checkpoint import expected_shapes, load_decoder, save_gguf, save_hf
from herdbook.model.config import DecoderConfig
from herdbook.model.modules import build
from tests.model.test_families import FIXTURES, of_fixture

#: those whose tensors lie in another order, or several in one
PACKED = [name for name in FIXTURES if of_fixture(name)[0].folds]
#: small ones that GGUF cannot say: it knows Baichuan by its layers
NOT_IN_GGUF = {"baichuan", "baichuan-13b", "baichuan-2", "falcon-rw", "gpt2-cerebras"}


@pytest.mark.parametrize("fixture", FIXTURES)
def test_names_are_a_bijection(fixture: str) -> None:
    family, config = of_fixture(fixture)
    shapes = expected_shapes(config)
    for side in (family.hf_tensor, family.gguf_tensor) if family.gguf else (family.hf_tensor,):
        sources = {side(name, config).name: side(name, config) for name in shapes}
        held = [name for one in sources.values() for name in one.ours]
        assert sorted(held) == sorted(shapes), "each of ours in one place, once"
        assert not any("{" in name for name in sources)
    if family.layout:
        assert len({family.layout(family.hf_name(name)) for name in shapes}) == len(shapes)
    rows = family.names | family.renamed(config)
    for module in {name.rpartition(".")[0] for name in shapes}:
        numbered = re.sub(r"\bblocks\.\d+", "blocks.{n}", module)
        alike = re.sub(r"\bexperts\.\d+", "experts.{e}", numbered)
        assert module in rows or alike in rows, "no module without a row"


@st.composite
def sizes(draw: st.DrawFn, config: DecoderConfig) -> DecoderConfig:
    """The same axes in other sizes."""

    def some(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    each = 1 if config.kv_heads == config.heads else some(2, 4)
    groups = 1 if config.kv_heads == 1 else some(1, 3)
    head_dim = 4 * some(1, 4)
    return dataclasses.replace(
        config,
        layers=1,
        windows=config.windows[:1],
        heads=each * groups,
        kv_heads=groups,
        head_dim=head_dim,
        rope_dim=2 * some(1, head_dim // 2) if config.rope_dim else 0,
        hidden=some(1, 9),
        ffn=some(1, 9),
        experts=some(config.experts_used, 5) if config.experts else 0,
    )


@pytest.mark.parametrize("fixture", PACKED)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_what_is_packed_is_unpacked(fixture: str, data: st.DataObject) -> None:
    """take ∘ join and join ∘ take are the identity, and the shape is the one that is expected."""
    family, found = of_fixture(fixture)
    config = data.draw(st.one_of(st.just(found), sizes(found)))
    shapes = expected_shapes(config)
    folded = set()
    for side in (family.hf_tensor, family.gguf_tensor) if family.gguf else (family.hf_tensor,):
        for source in {side(name, config).name: side(name, config) for name in shapes}.values():
            if source.fold is None:
                continue
            folded.add(source.name)
            wanted = [shapes[one] for one in source.ours]
            count = sum(map(torch.Size.numel, map(torch.Size, wanted)))
            values = (torch.randperm(count) + 2).double()
            parts = [
                part.view(one)
                for part, one in zip(
                    values.split([torch.Size(one).numel() for one in wanted]), wanted, strict=True
                )
            ]
            whole = source.fold.join(parts, config)
            assert tuple(whole.shape) == source.fold.shape(wanted)
            assert torch.equal(whole.flatten().sort()[0] + source.fold.plus, values.sort()[0])
            rows = [one[0] for one in wanted]
            taken = [source.fold.take(whole, n, rows, config) for n in range(len(parts))]
            assert all(torch.equal(a, b) for a, b in zip(taken, parts, strict=True))
            assert torch.equal(source.fold.join(taken, config), whole)
    assert folded


@pytest.mark.parametrize("fixture", FIXTURES)
def test_what_is_written_is_read_again(fixture: str, tmp_path: Path) -> None:
    """Every tensor, bit by bit: as a folder, from there as a folder again, and as a GGUF file."""
    family, config = of_fixture(fixture)
    decoder = build(config).eval()
    decoder.family = family.name
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():  # so that ± 1 is exact
            parameter.copy_(torch.randint(-512, 512, parameter.shape) / 256)

    def same(path: Path, axes: DecoderConfig = config) -> None:
        back = load_decoder(path, torch.float32)
        assert back.config == axes and type(back) is type(decoder)
        held = dict(back.named_parameters())
        assert held.keys() == dict(decoder.named_parameters()).keys()
        assert all(torch.equal(held[name], one) for name, one in decoder.named_parameters())

    save_hf(decoder, None, tmp_path / "a", torch.float32)
    same(tmp_path / "a")
    save_hf(load_decoder(tmp_path / "a", torch.float32), None, tmp_path / "b", torch.float32)
    first, again = (load_file(tmp_path / one / "model.safetensors") for one in "ab")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    if family.gguf and fixture not in NOT_IN_GGUF:
        save_gguf(decoder, None, tmp_path / "model.gguf", "F32")
        scaling = config.rope_scaling
        if scaling and scaling.kind == "dynamic":  # does nothing in the context; GGUF has none
            scaling = None
        same(tmp_path / "model.gguf", dataclasses.replace(config, rope_scaling=scaling))
    else:
        with pytest.raises(FamilyError, match="cannot be written as GGUF"):
            save_gguf(decoder, None, tmp_path / "model.gguf", "F32")
