"""Tensor parallelism of a block: query, key, value, gate and up split by columns, o and down by rows (Megatron).

Weights are DTensors on the tp dimension before FSDP2 shards them over the data-parallel workers; activations stay plain
tensors, replicated between the two halves of a block. In words: `copy_to_tp` in front of attention and MLP is the
identity forward and sums dx over tp backward; `reduce_from_tp` behind o_proj and down_proj sums the output forward and
is the identity backward. A layer computes with its tp-local matrix, which is a matrix of its own to everything else:
HD-PiSSA's gradient of the factor that is not split comes out as a part on each tp rank and is summed once per step by
the registry.

Embedding, norms and head are computed alike on every tp rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_hd.adapters.adapter_linear import AdapterLinear
from titan_hd.adapters.hdpissa import HDPissaLinear
from titan_hd.models.decoder import Decoder, RMSNorm

COLUMN_WISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_WISE = ("o_proj", "down_proj")


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gy):
        return funcol.all_reduce(gy.contiguous(), "sum", ctx.group), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return funcol.all_reduce(x.contiguous(), "sum", group)

    @staticmethod
    def backward(ctx, gy):
        return gy, None


def tensor_parallel_errors(shapes: dict[str, int], degree: int) -> list[str]:
    """Why a model's sizes (name -> number) cannot be split over `degree` ranks, one line each."""
    return [
        f"parallelism.tensor_parallel_degree: {degree} does not divide {name} = {size}"
        for name, size in shapes.items()
        if size % degree
    ]


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Split the linear layers of every block of a meta model over `mesh` (one dimension, "tp"), in place."""
    group = mesh.get_group()
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            part.forward = _with_copied_input(part.forward, group)
            for name, layer in part.named_children():
                if name in COLUMN_WISE:
                    _split(layer, mesh, 0, None)
                elif name in ROW_WISE:
                    _split(layer, mesh, 1, group)
                elif isinstance(layer, RMSNorm):  # of the rank's own heads: its gradient comes in parts
                    layer.forward = functools.partial(_norm_of_own_heads, layer, group)


def _with_copied_input(forward: Callable, group) -> Callable:
    def wrapped(x, *args):
        return forward(_CopyToTP.apply(x, group), *args)

    return wrapped


def _norm_of_own_heads(norm: RMSNorm, group, x: torch.Tensor) -> torch.Tensor:
    return norm.normalize(x, _CopyToTP.apply(norm.weight, group))


def _split(layer: nn.Linear, mesh: DeviceMesh, dim: int, reduce_group) -> None:
    """Make the weight a DTensor split in `dim`; the bias follows the output, or is added once behind the sum."""
    trained = layer.weight.requires_grad
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(dim)]), requires_grad=trained)
    if layer.bias is not None and dim == 0:
        bias = distribute_tensor(layer.bias.data, mesh, [Shard(0)])
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)

    split_bias = layer.bias if dim == 0 else None
    parts = functools.partial(_local_parts, layer, split_bias is not None)
    if isinstance(layer, AdapterLinear):
        _split_adapter(layer, mesh, dim)
    if isinstance(layer, (AdapterLinear, HDPissaLinear)):
        layer.parameters_for_compute = parts
        compute = layer.forward
    else:

        def compute(x):
            return F.linear(x, *parts())

    def row_wise(x):
        y = _ReduceFromTP.apply(compute(x), reduce_group)
        return y if layer.bias is None else y + layer.bias

    layer.forward = compute if dim == 0 else row_wise


def _split_adapter(layer: AdapterLinear, mesh: DeviceMesh, dim: int) -> None:
    """Split the tensors that go with dimension `dim` of W; of the others every rank has a part of the gradient."""
    group = mesh.get_group()
    for name, tensor_dim in layer.tp_splits[dim].items():
        tensor = distribute_tensor(getattr(layer, name).data, mesh, [Shard(tensor_dim)])
        setattr(layer, name, nn.Parameter(tensor))
    layer.tensor = functools.partial(_adapter_part, layer, frozenset(layer.tp_splits[dim]), group)
    if dim == 1:
        layer.sum_over_tp = functools.partial(funcol.all_reduce, reduceOp="sum", group=group)


def _adapter_part(layer: AdapterLinear, split: frozenset[str], group, name: str) -> torch.Tensor:
    tensor = getattr(layer, name)
    return tensor.to_local() if name in split else _CopyToTP.apply(tensor, group)


def _local_parts(layer: nn.Linear, with_bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layer.weight.to_local(), layer.bias.to_local() if with_bias else None
