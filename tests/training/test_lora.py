"""The hand-written LoRA equals its plain twin; starts from the base; costs nothing below itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from herdbook.model.lora import LoRALinear, adapters_of, apply_lora, merge_lora, together
from herdbook.model.low_rank import side_by_side


class Toy(nn.Module):
    """Blocks named as the decoder's are."""

    def __init__(self, layers: int = 3, width: int = 6) -> None:
        super().__init__()

        def linears(*names: str) -> nn.ModuleDict:
            return nn.ModuleDict({name: nn.Linear(width, width) for name in names})

        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"attention": linears("q", "k", "v", "o"), "mlp": linears("gate", "up", "down")}
            )
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            for part in block.values():
                for linear in part.values():
                    x = torch.tanh(linear(x))
        return x


def layer(bias: bool = True, dropout: float = 0.0, group: int = 1) -> LoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(8, 5, bias=bias, dtype=torch.float64)
    lora = LoRALinear(base, rank=3, alpha=6, dropout=dropout, group=group)
    nn.init.normal_(lora.A)
    nn.init.normal_(lora.B)
    return lora


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_plain_twin(bias, group):
    lora = layer(bias, group=group)
    assert lora.A.shape == (3, 8 // group) and lora.wide_A().shape == (3, 8)
    x = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    above = torch.randn(11, 5, dtype=torch.float64)
    inputs = (x, lora.A, lora.B)
    fast, plain = lora(x), lora.plain(x)
    torch.testing.assert_close(fast, plain)
    for ours, theirs in zip(
        torch.autograd.grad(fast, inputs, above),
        torch.autograd.grad(plain, inputs, above),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("group", [1, 4])
def test_gradcheck(group):
    lora = layer(group=group)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, A, B: lora(x), (x, lora.A, lora.B))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_several_that_read_the_same_are_one_product(group, bias, beside):
    torch.manual_seed(0)
    bases = [nn.Linear(8, size, bias=bias, dtype=torch.float64) for size in (5, 3, 4)]
    if beside:
        side_by_side(bases)
        assert len({base.weight.untyped_storage().data_ptr() for base in bases}) == 1
    layers = [
        LoRALinear(base, rank=r, alpha=2 * r, group=group)
        for base, r in zip(bases, (3, 1, 2), strict=True)
    ]
    for one in layers:
        nn.init.normal_(one.A)
        nn.init.normal_(one.B)
    x = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(one.A for one in layers), *(one.B for one in layers))
    fast, plain = together(x, *layers), torch.cat([one.plain(x) for one in layers], -1)
    torch.testing.assert_close(fast, plain)
    above = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(fast, inputs, above),
        torch.autograd.grad(plain, inputs, above),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    layers[1].bypassed = True
    assert together(x, *layers) is None and together(x, *bases) is None


def test_starts_as_the_base_and_merges_in_float32():
    torch.manual_seed(1)
    base = nn.Linear(7, 5)
    x = torch.randn(3, 7)
    before = base(x)
    lora = LoRALinear(base, rank=2, alpha=4)
    lora.start(0, "one")
    assert torch.equal(lora(x), before)
    nn.init.normal_(lora.B)
    after = lora(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(lora.merge()(x), after)


def test_the_start_depends_on_seed_and_name_alone():
    def started(last_layers: int, seed: int) -> dict[str, LoRALinear]:
        return apply_lora(
            Toy(), targets=("q", "down"), rank=2, alpha=4, last_layers=last_layers, seed=seed
        )

    every, last, other = started(0, 0), started(1, 0), started(0, 1)
    assert list(every) == [f"blocks.{n}.{w}" for n in range(3) for w in ("attention.q", "mlp.down")]
    assert list(last) == ["blocks.2.attention.q", "blocks.2.mlp.down"]
    name = "blocks.2.mlp.down"
    assert torch.equal(every[name].A, last[name].A)
    assert not torch.equal(every[name].A, other[name].A)
    assert every[name].A.abs().max() <= 6**-0.5 and not every[name].B.any()


def test_dropout_is_on_the_correction_only_and_off_outside_training():
    lora = layer(dropout=0.5)
    x = torch.randn(4, 8, dtype=torch.float64)
    lora.eval()
    whole = lora(x)
    lora.train()
    assert not torch.allclose(lora(x), whole)
    nn.init.zeros_(lora.B)
    torch.testing.assert_close(lora(x), lora.base(x))


def test_below_the_first_adapter_no_graph_is_kept():
    toy = Toy()
    apply_lora(toy, targets=("q",), rank=2, alpha=4, last_layers=1)
    seen: list[bool] = []
    for block in toy.blocks:
        block["mlp"]["down"].register_forward_hook(
            lambda module, inputs, output: seen.append(output.requires_grad)
        )
    toy(torch.randn(2, 6)).sum().backward()
    assert seen == [False, False, True]
    assert [n for n, p in toy.named_parameters() if p.grad is not None] == [
        "blocks.2.attention.q.A",
        "blocks.2.attention.q.B",
    ]


def test_merging_takes_every_adapter_off():
    toy = Toy()
    x = torch.randn(2, 6)
    for lora in apply_lora(toy, targets=("q", "o", "up"), rank=2, alpha=4).values():
        nn.init.normal_(lora.B)
    adapted = toy(x)
    merge_lora(toy)
    assert not adapters_of(toy)
    torch.testing.assert_close(toy(x), adapted)
