"""From shards to whole tensors, each on one rank, and back: for work that needs all of a weight (an SVD, a merge).

Tensors are dealt in waves of one per rank. A replica has all parts of all tensors, so in a wave every rank sends its
part of tensor j to rank j of its own replica (`collect`). Rank j computes, and sends every rank of its replica its part
of the result; replicas then tell each other what theirs have computed (`hand_back`). No rank holds more than one whole
tensor, and each gets its parts once. Whole tensors, and the parts that are handed back, lie on the device; shards may
lie on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard

from titan_hd.distributed.collectives import broadcast, exchange_lists
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
    first, mine = _of_replica(wave, dims)
    if not mine:
        return None
    nothing = wave[0].local.new_empty(0, device=dims.device_type)
    here = [tensor.local.to(dims.device_type) if _sends(dims.rank, tensor, dims) else nothing for tensor in mine]
    send = here + [nothing] * (dims.replica_size - len(mine))
    if dims.rank >= len(wave):
        exchange_lists(send, [(0,)] * dims.replica_size, dims.replica_group)
        return None
    own = wave[dims.rank]
    places = [dims.place(first + member) for member in range(dims.replica_size)]
    blocks = [owned_block(own.shape, own.split, place, dims) for place in places]
    whole = own.local.new_empty(own.shape, device=dims.device_type)
    parts = [cut(whole, block) for block in blocks]
    shapes = [tuple(p.shape) if _sends(first + m, own, dims) else (0,) for m, p in enumerate(parts)]
    received = exchange_lists(send, shapes, dims.replica_group)
    for member, (part, values) in enumerate(zip(parts, received)):
        if _sends(first + member, own, dims):
            part.copy_(values)
    return whole


def hand_back(wave: list[Sharded], whole: torch.Tensor | None, dims: ParallelDims) -> list[torch.Tensor]:
    """This rank's part of every tensor of the wave, fp32, from the ranks that have them whole. Collective.

    whole: fp32, of the shape of tensor number `rank` of the wave; None where `collect` gave None.
    """
    size, (first, mine) = dims.replica_size, _of_replica(wave, dims)
    parts: list[torch.Tensor] = []
    if mine:
        send = [torch.empty(0, device=dims.device_type)] * size
        if whole is not None:
            own = wave[dims.rank]
            places = [dims.place(first + member) for member in range(size)]
            send = [cut(whole, owned_block(own.shape, own.split, place, dims)) for place in places]
        shapes = [tuple(tensor.local.shape) for tensor in mine]
        parts = exchange_lists(send, [*shapes, *[(0,)] * (size - len(mine))], dims.replica_group)[: len(mine)]
    return parts if dims.dp_replicate == 1 else _over_replicas(wave, first, parts, dims)


def _over_replicas(
    wave: list[Sharded], first: int, parts: list[torch.Tensor], dims: ParallelDims
) -> list[torch.Tensor]:
    """This rank's part of every tensor of the wave, from those that its replica, whose first rank is `first`, has."""
    group, found, works = dims.world.get_group("dp_replicate"), [], []
    for start in range(0, len(wave), dims.replica_size):
        shapes = [tensor.local.shape for tensor in wave[start : start + dims.replica_size]]
        sizes = [shape.numel() for shape in shapes]
        flat = torch.zeros(sum(sizes), device=dims.device_type)
        if start == first:
            torch.cat([part.flatten() for part in parts], out=flat)
        works.append(broadcast(flat, group, start // dims.replica_size))
        found += [part.view(shape) for part, shape in zip(flat.split(sizes), shapes)]
    for work in works:
        work.wait()
    return found


def _of_replica(wave: list[Sharded], dims: ParallelDims) -> tuple[int, list[Sharded]]:
    """The first rank of this rank's replica, and the tensors of the wave that its ranks get."""
    first = dims.rank // dims.replica_size * dims.replica_size
    return first, wave[first : first + dims.replica_size]


def _sends(rank: int, tensor: Sharded, dims: ParallelDims) -> bool:
    """Whether a rank's part is wanted: tp ranks have the same part of what is not split over them."""
    return dims.first_in_replica(rank, tensor.split)


def cut(whole: torch.Tensor, block: Block) -> torch.Tensor:
    """A view of a block of a tensor [rows], [rows, columns] or [rows, columns, ...]."""
    part = whole[block.row : block.row + block.rows]
    return part[:, block.column : block.column + block.columns] if whole.dim() > 1 else part
