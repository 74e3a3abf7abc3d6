"""Tensor parallelism's collectives for autograd, in pairs: what one does forward, its twin does backward.

Activations are plain tensors. x is "whole" where every tp rank has all of [B, T, ...], alike; "in parts" where ranks
hold terms of a sum; "in pieces" where rank i holds positions i*c to (i+1)*c - 1 of the sequence, c = ceil(T / tp), the
last ones padded with zeros.

function            forward                         backward
copy_to_tp          whole, as it is                 parts -> whole (all-reduce)
reduce_from_tp      parts -> whole (all-reduce)     whole, as it is
gather_sequence     pieces -> whole (all-gather)    parts -> pieces (reduce-scatter)
scatter_sequence    parts -> pieces (reduce-scatter)  pieces -> whole (all-gather)
gather_alike        pieces -> whole (all-gather)    whole -> own piece, as every rank goes on alike
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

# torch 2.13 deprecates the older names, 2.11 knows no others.
_all_gather_single = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter_single = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gy):
        return _all_reduce(gy, ctx.group), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, gy):
        return gy, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, length, group):
        ctx.group = group
        return _gather(x, length, group)

    @staticmethod
    def backward(ctx, gy):
        return _reduce_scatter(gy, ctx.group), None, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.length, ctx.group = x.shape[1], group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, gy):
        return _gather(gy, ctx.length, ctx.group), None


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, length, group):
        ctx.group = group
        return _gather(x, length, group)

    @staticmethod
    def backward(ctx, gy):
        return own_piece(gy, ctx.group), None, None


def copy_to_tp(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return _CopyToTP.apply(x, group)


def reduce_from_tp(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return _ReduceFromTP.apply(x, group)


def gather_sequence(x: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[B, c, ...] -> [B, length, ...]"""
    return _GatherSequence.apply(x, length, group)


def scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[B, T, ...] -> [B, c, ...]"""
    return _ScatterSequence.apply(x, group)


def gather_alike(x: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[B, c, ...] -> [B, length, ...]"""
    return _GatherAlike.apply(x, length, group)


def gather_dim(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' tensors, concatenated in a dimension. No gradient."""
    return _arrived(_all_gather_single(x.contiguous(), dim, group))


def own_piece(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's piece of a whole [B, T, ...]; gradients flow, into this piece alone."""
    return _padded(x, group).chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)]


def _padded(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    missing = -x.shape[1] % dist.get_world_size(group)
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x


def _gather(x: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    return gather_dim(x, 1, group)[:, :length]


def _reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return _arrived(_reduce_scatter_single(_padded(x, group).contiguous(), "sum", 1, group))


def _all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return _arrived(funcol.all_reduce(x.contiguous(), "sum", group))


def _arrived(x: torch.Tensor) -> torch.Tensor:
    """A plain tensor: each layer that reads one that is still under way would wrap and save one of its own."""
    return x.wait() if isinstance(x, funcol.AsyncCollectiveTensor) else x
