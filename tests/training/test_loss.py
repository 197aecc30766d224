"""The fused loss equals its plain twin, value and both gradients, and its targets are right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdbook.training import loss as losses
from herdbook.training.loss import (
    IGNORE,
    linear_cross_entropy,
    linear_divergence,
    next_tokens,
    plain_linear_cross_entropy,
    plain_linear_divergence,
)


def case(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, some: float = 0.5):
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, hidden, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, dtype=dtype, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) >= some] = IGNORE
    return states, weight, targets


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_equals_the_plain_twin(dtype, error, share, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 1)  # chunks of 16 rows: several, the last not full
    states, weight, targets = case(75, 12, 301, dtype, share)
    plain = plain_linear_cross_entropy(states, weight, targets)
    wanted = torch.autograd.grad(plain * 0.3, (states, weight), allow_unused=True)
    fused = linear_cross_entropy(states, weight, targets)
    got = torch.autograd.grad(fused * 0.3, (states, weight))
    assert float(fused.detach()) == pytest.approx(float(plain.detach()), rel=error)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=error, atol=error)


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_the_divergence_equals_its_plain_twin(dtype, error, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 1)
    states, weight, _ = case(75, 12, 301, dtype)
    weight.requires_grad_(False)
    base = states.detach() + 0.1 * torch.randn(75, 12, dtype=dtype)
    plain = plain_linear_divergence(states, base, weight)
    (wanted,) = torch.autograd.grad(plain * 0.3, states)
    fused = linear_divergence(states, base, weight)
    (got,) = torch.autograd.grad(fused * 0.3, states)
    assert float(fused.detach()) == pytest.approx(float(plain.detach()), rel=error * 10)
    torch.testing.assert_close(got, wanted, rtol=error * 10, atol=error)


def test_where_nothing_has_moved_nothing_pulls():
    states, weight, _ = case(20, 8, 50, torch.float32)
    weight.requires_grad_(False)
    loss = linear_divergence(states, states.detach().clone(), weight)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert states.grad.abs().max() < 1e-6


def test_gradcheck():
    states, weight, targets = case(9, 5, 23, torch.float64)
    assert torch.autograd.gradcheck(linear_cross_entropy, (states, weight, targets))


def test_a_frozen_head_gets_no_gradient():
    states, weight, targets = case(9, 5, 23, torch.float32)
    weight.requires_grad_(False)
    linear_cross_entropy(states, weight, targets).backward()
    assert weight.grad is None and states.grad is not None


def test_large_logits_stay_finite():
    states, weight, targets = case(20, 4, 30, torch.float32)
    loss = linear_cross_entropy(states * 1e3, weight, targets)
    loss.backward()
    assert loss.isfinite() and states.grad.isfinite().all()


documents = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=6),
    min_size=1,
    max_size=6,
)


@given(documents)
@settings(max_examples=60, deadline=None)
def test_packed_targets_are_those_of_each_document_alone(docs):
    alone: list[int] = []
    for doc in docs:
        alone += [token if trained else IGNORE for token, trained in doc[1:]] + [IGNORE]
    flat = [token for doc in docs for token in doc]
    ids, mask = [t for t, _ in flat], [m for _, m in flat]
    assert next_tokens(ids, mask, [len(doc) for doc in docs]).tolist() == alone
