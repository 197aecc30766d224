"""The hand-written backward passes equal autograd's own: norm, rotation, gate, causal attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from herdbook.model import causal, fused
from herdbook.model.attention import Look
from herdbook.model.layers import rotate
from herdbook.model.layout import Packed


def close(fast, plain, *inputs):
    """Results and gradients, in float64; and the derivative itself."""
    above = torch.randn_like(plain(*inputs))
    found = [(y := one(*inputs), *torch.autograd.grad(y, inputs, above)) for one in (fast, plain)]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(fast, inputs)


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(5, 6), (3, 2, 6)])
def test_norm(shape, monkeypatch):
    monkeypatch.setattr(fused, "STRIP", 18)
    x, weight = drawn(*shape), drawn(6, seed=1)
    close(
        lambda x, w: fused.rms_norm(x, w, 1e-3),
        lambda x, w: F.rms_norm(x, (6,), w, 1e-3),
        x,
        weight,
    )


@pytest.mark.parametrize("size", [6, 4])
def test_rotation(size):
    angle = drawn(5, 1, size // 2).detach()
    cos, sin = (torch.cat([t, t], -1)[:, :, None] for t in (angle.cos(), angle.sin()))
    sin = torch.cat([-sin[..., : size // 2], sin[..., size // 2 :]], -1)
    half = size // 2

    def plain(x):
        a, b, rest = x[..., :half], x[..., half:size], x[..., size:]
        c, s = angle.cos(), angle.sin()
        return torch.cat([a * c - b * s, b * c + a * s, rest], -1)

    x = drawn(5, 2, 6)
    close(lambda x: rotate(x, cos, sin), plain, x)
    torch.testing.assert_close(rotate(x.detach(), cos, sin), plain(x))


def test_gate():
    def plain(gate, up):
        return F.silu(gate) * up

    close(fused.swiglu, plain, drawn(3, 4), drawn(3, 4, seed=1))
    close(fused.swiglu, lambda both: plain(*both.chunk(2, -1)), drawn(3, 8))


class Torch(Packed):
    """Each document by PyTorch's own attention."""

    def _plain(self, look, q):
        return False


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize("lengths", [[4, 2, 4, 1, 2], [7], [3, 3]])
def test_causal_attention(heads, lengths, monkeypatch):
    monkeypatch.setattr(causal, "STRIP", 3)
    tokens = sum(lengths)
    inputs = [drawn(tokens, h, 4, seed=n) for n, h in enumerate((heads[0], heads[1], heads[1]))]
    look = Look(0.3)
    close(
        lambda *qkv: Packed(lengths).attend(0, *qkv, look),
        lambda *qkv: Torch(lengths).attend(0, *qkv, look),
        *inputs,
    )


def test_in_bfloat16_attentions_gradients_are_off_by_its_rounding_alone():
    """With scores up to 30: what is taken off is taken off before anything is rounded."""
    lengths, look = [300, 40], Look(0.125)
    drawings = [3 * drawn(340, 6, 64), *(drawn(340, 2, 64, seed=n) for n in (1, 2))]
    rounded = [t.detach().bfloat16().requires_grad_() for t in drawings]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    above = drawn(340, 6, 64, seed=5).detach().bfloat16()
    want = torch.autograd.grad(Torch(lengths).attend(0, *exact, look), exact, above.double())
    got = torch.autograd.grad(Packed(lengths).attend(0, *rounded, look), rounded, above)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).norm() < 2**-7 * theirs.norm()
