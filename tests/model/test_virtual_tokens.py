"""Virtual tokens in a pack against plain twins, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from herdbook.model.decoder import Decoder
from herdbook.model.layout import Masked, Packed
from herdbook.model.lora import bypass
from herdbook.model.soft import Prefix, Prompt, Soft, apply_soft
from tests.model.test_families import of_fixture

LENGTHS = [7, 4, 7]
N = 3


class Before(Masked):
    """One document whose keys and values follow a prefix's: softmax written out."""

    prefix: Prefix

    def attend(self, layer, q, k, v, look):
        places = torch.arange(N, N + len(q))
        back = places[:, None] - torch.arange(N + len(q))
        k, v = (
            torch.cat(two).repeat_interleave(q.shape[1] // k.shape[1], 1)
            for two in zip(self.prefix.before(layer, k.dtype), (k, v), strict=True)
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) * look.scale
        if look.slopes:
            scores = scores - torch.tensor(look.slopes)[:, None, None] * back
        hidden = back < 0 if look.window is None else (back < 0) | (back >= look.window)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def plain(decoder: Decoder, soft: Soft, ids: Tensor) -> Tensor:
    """One document's hidden states."""
    with bypass(decoder):
        if isinstance(soft, Prefix):
            layout = Before([len(ids)])
            layout.prefix, layout.positions = soft, layout.positions + N
            return decoder(ids, layout)
        layout = Masked([N + len(ids)])
        rows = torch.cat([soft.rows, decoder.embed(ids)])
        if decoder.embed_norm is not None:
            rows = decoder.embed_norm(rows)
        return decoder.finish(decoder.through(rows, layout))[N:]


@pytest.mark.parametrize("family", ["llama", "bloom", "mistral", "qwen3"])
@pytest.mark.parametrize("kind", [Prefix, Prompt])
def test_a_pack_equals_its_plain_twin(kind: type[Soft], family: str) -> None:
    decoder = Decoder(of_fixture(family)[1])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.normal_(float("norm" in name and "bias" not in name), 0.2)
    soft = apply_soft(decoder, kind, N)
    ids = torch.randint(3, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    ours = decoder(ids, Packed(LENGTHS))
    twin = torch.cat([plain(decoder, soft, one) for one in torch.split(ids, LENGTHS)])
    torch.testing.assert_close(ours, twin, atol=1e-4, rtol=1e-4)
    above = torch.randn_like(ours)
    parameters = list(soft.parameters())
    for a, b in zip(
        torch.autograd.grad(ours, parameters, above),
        torch.autograd.grad(twin, parameters, above),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    with bypass(decoder):
        base = decoder(ids, Packed(LENGTHS))
    decoder.soft = None
    assert torch.equal(base, decoder(ids, Packed(LENGTHS)))
    assert not torch.allclose(base, ours, atol=1e-2)
