"""Tensor parallelism's collectives as autograd functions, in pairs: each one's backward is its twin's forward.

Activations are plain tensors, so a layout is a matter of who calls what. The words are DTensor's, over the tp ranks:

Replicate   every rank has all of [B, T, ...], the same
Partial     every rank has [B, T, ...]; the value is the sum over ranks
Shard(1)    rank i has positions i*c to (i+1)*c - 1 of the sequence, [B, c, ...] with c = ceil(T / tp); the last ones
            are padded with zeros, so that T need not be a multiple of tp

function          forward                                 backward
copy_to_tp        Replicate, unchanged                    Partial -> Replicate (all-reduce)
reduce_from_tp    Partial -> Replicate (all-reduce)       Replicate, unchanged
gather_sequence   Shard(1) -> Replicate (all-gather)      Partial -> Shard(1) (reduce-scatter)
scatter_sequence  Partial -> Shard(1) (reduce-scatter)    Shard(1) -> Replicate (all-gather)
gather_alike      Shard(1) -> Replicate (all-gather)      Replicate -> Shard(1) (own piece, nothing travels)

gather_sequence is for layers that are split, whose ranks compute different terms of dx; gather_alike for layers that
all ranks compute alike.
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
    def backward(ctx, *gys):
        return _all_reduce(gys[0], ctx.group), None


class _ReduceFromTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, *gys):
        return gys[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, length, group):
        ctx.group = group
        return _gather(x, length, group)

    @staticmethod
    def backward(ctx, *gys):
        return _reduce_scatter(gys[0], ctx.group), None, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.length, ctx.group = x.shape[1], group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, *gys):
        return _gather(gys[0], ctx.length, ctx.group), None


class _GatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, length, group):
        ctx.group = group
        return _gather(x, length, group)

    @staticmethod
    def backward(ctx, *gys):
        return own_piece(gys[0], ctx.group), None, None


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
    """Replicate -> Shard(1): this rank's positions of [B, T, ...]. The gradient of the other positions is zero."""
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
    """Wait here, once; otherwise every consumer of the AsyncCollectiveTensor saves its own copy for backward."""
    return x.wait() if isinstance(x, funcol.AsyncCollectiveTensor) else x
