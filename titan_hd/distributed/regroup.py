"""From shards to whole tensors, each on one rank, and back: for work that needs all of a weight (an SVD, a merge).

Tensors are dealt in waves of one per rank. In a wave, every rank sends its part of tensor j to rank j (`collect`), rank
j computes, and sends every rank its part of the result (`hand_back`): two all-to-alls, and no rank holds more than one
whole tensor. Whole tensors, and the parts that are handed back, lie on the device; shards may lie on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard

from titan_hd.distributed.collectives import exchange_lists
from titan_hd.distributed.parallel_dims import Block, ParallelDims, local_part, owned_block


class Sharded(NamedTuple):
    """A tensor of `shape`, split over tp in dimension `split` (None: not), of which this rank holds `local`."""

    shape: tuple[int, ...]
    split: int | None
    local: torch.Tensor


def sharded(parameter: torch.Tensor) -> Sharded:
    """A parameter that FSDP2 shards."""
    return Sharded(tuple(parameter.shape), tp_split(parameter), local_part(parameter.detach()))


def tp_split(parameter: torch.Tensor) -> int | None:
    """The dimension in which tensor parallelism splits a parameter, or None. FSDP2 puts the data-parallel placements
    first, so it is the last one's."""
    assert isinstance(parameter, DTensor)
    last = parameter.placements[-1]
    return last.dim if "tp" in (parameter.device_mesh.mesh_dim_names or ()) and isinstance(last, Shard) else None


def waves(names: Sequence[str], dims: ParallelDims) -> Iterator[list[str]]:
    """One name for every rank at a time; the last wave may be short."""
    for start in range(0, len(names), dims.world_size):
        yield list(names[start : start + dims.world_size])


def collect(wave: list[Sharded], dims: ParallelDims) -> torch.Tensor | None:
    """Tensor number `rank` of the wave, whole; None on ranks beyond the wave's length. Collective."""
    nothing = wave[0].local.new_empty(0, device=dims.device_type)
    send = [
        tensor.local.to(dims.device_type) if dims.first_copy(dims.rank, tensor.split) else nothing for tensor in wave
    ]
    send += [nothing] * (dims.world_size - len(wave))
    if dims.rank >= len(wave):
        exchange_lists(send, [(0,)] * dims.world_size)
        return None
    own = wave[dims.rank]
    blocks = {
        rank: owned_block(own.shape, own.split, dims.place(rank), dims)
        for rank in range(dims.world_size)
        if dims.first_copy(rank, own.split)
    }
    whole = own.local.new_empty(own.shape, device=dims.device_type)
    shapes = [cut(whole, blocks[r]).shape if r in blocks else (0,) for r in range(dims.world_size)]
    received = exchange_lists(send, shapes)
    for rank, block in blocks.items():
        cut(whole, block).copy_(received[rank])
    return whole


def hand_back(wave: list[Sharded], whole: torch.Tensor | None, dims: ParallelDims) -> list[torch.Tensor]:
    """This rank's part of every tensor of the wave, fp32, from the ranks that have them whole. Collective.

    whole: fp32, of the shape of tensor number `rank` of the wave; None where `collect` gave None.
    """
    size = dims.world_size
    send = [torch.empty(0, device=dims.device_type)] * size
    if whole is not None:
        own = wave[dims.rank]
        send = [cut(whole, owned_block(own.shape, own.split, dims.place(rank), dims)) for rank in range(size)]
    shapes: list[tuple[int, ...]] = [tuple(tensor.local.shape) for tensor in wave]
    shapes += [(0,)] * (size - len(wave))
    return exchange_lists(send, shapes)[: len(wave)]


def cut(whole: torch.Tensor, block: Block) -> torch.Tensor:
    """A view of a block of a tensor [rows], [rows, columns] or [rows, columns, ...]."""
    part = whole[block.row : block.row + block.rows]
    return part[:, block.column : block.column + block.columns] if whole.dim() > 1 else part
