"""A model of which each process holds a share: torch's fully_shard, and DTensor's split matrices.

    Sharded          every weight is cut along its first axis; a block's are fetched whole just before
                     it computes, on the way there and on the way back, and its gradients are summed
                     to where their share of the weights is
    split_matrices   q k v gate up are cut by outputs, o and down by inputs: a process computes its own
                     heads and its own width of the MLP, and the two sums of a block go over all

Zhao et al., "PyTorch FSDP", 2023 (arXiv:2304.11277); Shoeybi et al., "Megatron-LM", 2019
(arXiv:1909.08053).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from herdbook.errors import ConfigError
from herdbook.model.decoder import Attention, Block, Decoder
from herdbook.model.layers import Linear
from herdbook.model.lora import LoRALinear
from herdbook.model.mlp import MLP, Experts
from herdbook.tokens.chat import Rendering
from herdbook.tokens.packing import Pack


class Sharded(nn.Module):
    """An objective whose decoder is sharded over the mesh's processes.

    What is not in a block (embedding, norm, head, virtual tokens) is fetched for a pack's whole
    computation, so this module is called where the objective would be. mixed: weights are fetched in
    bfloat16; gradients are summed, and weights kept, in float32.
    """

    def __init__(self, objective: Any, decoder: Decoder, mesh: Any, mixed: bool) -> None:
        super().__init__()
        if any(isinstance(one, Experts) for one in decoder.modules()):
            raise ConfigError(
                "a mixture of experts under fsdp",
                rule="would wait for experts that no token of a pack chose",
                next="set parallel to ddp",
            )
        self.decoder = decoder
        self.objective = objective
        narrow = torch.bfloat16 if mixed else None
        policy = MixedPrecisionPolicy(narrow, torch.float32 if mixed else None)
        for block in decoder.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self, mesh=mesh, mp_policy=policy)
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # sums: the loss is divided already
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled ones

    def packs(self, rows: Sequence[Rendering], capacity: int) -> Sequence[Pack]:
        found: Sequence[Pack] = self.objective.packs(rows, capacity)
        return found

    def weight(self, pack: Pack) -> int:
        return int(self.objective.weight(pack))

    def loss(self, pack: Pack) -> Tensor:
        loss: Tensor = self(pack)
        return loss

    def forward(self, pack: Pack) -> Tensor:
        loss: Tensor = self.objective.loss(pack)
        return loss


class _ByOutputs(ColwiseParallel):
    """Of our own linear layers, with or without LoRA: W and its bias, and B, by outputs; A whole."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return _split(self, module, device_mesh, {"weight": 0, "bias": 0, "B": 0})


class _ByInputs(RowwiseParallel):
    """W and A by inputs; the bias and B whole."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        self.desired_input_layouts = self.input_layouts
        return _split(self, module, device_mesh, {"weight": 1, "A": 1})


def _split(style: Any, module: nn.Module, mesh: Any, axes: dict[str, int]) -> nn.Module:
    from functools import partial

    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    def cut(name: str, one: nn.Module, mesh: Any) -> None:
        for key, parameter in list(one.named_parameters(recurse=False)):
            where = Shard(axes[key]) if key in axes else Replicate()
            # every process has loaded the same: nothing is sent
            spread = distribute_tensor(parameter.detach(), mesh, [where], src_data_rank=None)
            one.register_parameter(key, nn.Parameter(spread, parameter.requires_grad))

    if isinstance(module, LoRALinear):
        adapter = module  # its kernel knows no shares; the twin's products are DTensor's own

        def forward(x: Tensor) -> Tensor:
            y: Tensor = adapter.base(x) if adapter.bypassed else adapter.plain(x)
            return y

        adapter.forward = forward  # type: ignore[method-assign]
    return distribute_module(
        module,
        mesh,
        cut,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


def split_matrices(decoder: Decoder, mesh: Any) -> list[nn.Parameter]:
    """Cut the blocks' matrices. The parameters that see a process's own heads alone, so that their
    gradients have to be summed: the norms of queries and keys."""
    c, ways = decoder.config, mesh.size()
    plain = all(
        type(block) is Block and type(block.attention) is Attention and type(block.mlp) is MLP
        for block in decoder.blocks
    )
    if not plain or c.position == "alibi":
        raise ConfigError(
            f"a {decoder.family} model under tp",
            rule="is not cut: only LLaMA's shape of attention and MLP is",
            next="set parallel to fsdp or ddp",
        )
    for name, size in (("kv_heads", c.kv_heads), ("heads", c.heads), ("ffn", c.ffn)):
        if size % ways:
            raise ConfigError(
                f"tp:{ways} and a model with {name} {size}",
                rule="which does not divide evenly",
                next="take another number, or set parallel to fsdp",
            )
    makers: dict[str, Callable[[], Any]] = {
        **{f"attention.{name}": _ByOutputs for name in ("q", "k", "v")},
        **{f"mlp.{name}": _ByOutputs for name in ("gate", "up")},
        **{name: _ByInputs for name in ("attention.o", "mlp.down")},
    }
    partial: list[nn.Parameter] = []
    for block in decoder.blocks:
        there = {name: make for name, make in makers.items() if _has(block, name)}
        parallelize_module(block, mesh, {name: make() for name, make in there.items()})
        attention: Any = block.attention
        for norm in (attention.q_norm, attention.k_norm):
            partial += [] if norm is None else list(norm.parameters())
    return partial


def _has(block: nn.Module, name: str) -> bool:
    room, _, leaf = name.partition(".")
    layer = getattr(block.get_submodule(room), leaf)
    assert layer is None or isinstance(layer, Linear | LoRALinear), type(layer)
    return layer is not None


def gather(decoder: nn.Module, keep: bool) -> None:
    """Fetch every weight whole, one after another; who does not keep them stays with its shares."""
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            held: Any = parameter.detach()
            if isinstance(held, DTensor):
                whole = held.full_tensor()
                if keep:
                    setattr(module, name, nn.Parameter(whole.cpu(), parameter.requires_grad))
