"""Packed attention against its plain twin, and documents that must not see each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.model.attention import Look, alibi_slopes
from herdbook.model.config import DecoderConfig
from herdbook.model.decoder import Decoder
from herdbook.model.layout import Masked, Packed

CONFIG = DecoderConfig(
    vocab=50, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, max_pos=64
)


def random_decoder(config: DecoderConfig = CONFIG) -> Decoder:
    decoder = Decoder(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in decoder.parameters():
            p.normal_(0, 0.3)
    return decoder


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@given(
    lengths=LENGTHS,
    window=st.none() | st.integers(1, 10),
    kv_heads=st.sampled_from([1, 2, 4]),
    softcap=st.sampled_from([0.0, 0.7]),
    slopes=st.sampled_from([(), alibi_slopes(4)]),
)
@settings(max_examples=100, deadline=None)
def test_packed_is_the_masked_twin(
    lengths: list[int],
    window: int | None,
    kv_heads: int,
    softcap: float,
    slopes: tuple[float, ...],
) -> None:
    torch.manual_seed(1)
    tokens = sum(lengths)
    q = torch.randn(tokens, 4, 8)
    k, v = torch.randn(tokens, kv_heads, 8), torch.randn(tokens, kv_heads, 8)
    packed, masked = Packed(lengths), Masked(lengths)
    assert torch.equal(packed.positions, masked.positions)
    look = Look(0.3, window, softcap, slopes)
    got, want = (layout.attend(0, q, k, v, look) for layout in (packed, masked))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_the_twin(window: int | None) -> None:
    """Documents of equal length apart from each other, so that rows are gathered and put back."""
    lengths, found = [4, 2, 4, 1, 2], []
    for layout in (Packed(lengths), Masked(lengths)):
        torch.manual_seed(2)
        q, k, v = (torch.randn(13, h, 8, requires_grad=True) for h in (4, 2, 2))
        out = layout.attend(0, q, k, v, Look(0.35, window))
        (out * torch.randn(13, 4, 8)).sum().backward()
        found.append((q.grad, k.grad, v.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@given(lengths=LENGTHS)
@settings(max_examples=20, deadline=None)
def test_a_pack_gives_what_its_documents_give_alone(lengths: list[int]) -> None:
    decoder = random_decoder()
    ids = torch.randint(0, 50, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        together = decoder(ids, Packed(lengths))
        alone = [decoder(part, Packed([len(part)])) for part in ids.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_a_later_token_changes_nothing_before_it() -> None:
    decoder = random_decoder()
    ids = torch.arange(12)
    other = ids.clone()
    other[7] = 40
    with torch.inference_mode():
        a, b = decoder(ids, Packed([5, 7])), decoder(other, Packed([5, 7]))
    assert torch.equal(a[:5], b[:5]), "the first document does not see the second"
    torch.testing.assert_close(a[5:7], b[5:7])
    assert not torch.allclose(a[7:], b[7:])


def test_a_token_is_blind_beyond_its_window() -> None:
    config = DecoderConfig(**(CONFIG.__dict__ | {"layers": 1, "windows": (3,)}))
    decoder = random_decoder(config)
    ids = torch.arange(10)
    other = ids.clone()
    other[0] = 40
    with torch.inference_mode():
        a, b = decoder(ids, Packed([10])), decoder(other, Packed([10]))
    torch.testing.assert_close(a[3:], b[3:])
    assert not torch.allclose(a[2], b[2])
