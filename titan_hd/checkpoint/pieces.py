"""Which parts of which tensors this rank writes into a checkpoint, and what the tensors are called there.

Tensors of the same shape in all blocks of the model are stored as one, the block in front: W of `q_proj` of 32 blocks
is `model.model.layers.*.self_attn.q_proj.weight` [32, out, in]. That is a fraction of the entries in the table of
contents, which rank 0 makes for all ranks. `reader` shows every block's tensor under its own name.

A part that several ranks hold (replicas, workers that share an adapter, tp ranks where a tensor is not split) is
written by the first of them. Every rank finds out by itself which parts are its own, so no plans travel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

# Bytes of a piece, unless a single block's part has more: what is read and copied at a time.
PIECE_BYTES = 2**28

_IN_A_BLOCK = re.compile(r"(.*\blayers\.)(\d+)(\..+)")


class Stored(NamedTuple):
    """A tensor as a checkpoint stores it."""

    name: str
    size: tuple[int, ...]
    dtype: torch.dtype


class Piece(NamedTuple):
    """A box of a stored tensor that this rank writes: from `offsets` on, `sizes` long.

    parts: what it consists of, local tensors on any device. One; or those of consecutive blocks, which the first
    dimension counts. values: a copy of them on the host, in one tensor, alone in its memory.
    """

    tensor: Stored
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    parts: list[torch.Tensor]
    values: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.tensor.dtype.itemsize

    def copied_to(self, buffer: torch.Tensor) -> Piece:
        """The piece with values; buffer: on the host, of `sizes`. The copy from a device may be under way on return."""
        stacked = len(self.sizes) > self.parts[0].dim()
        for view, part in zip(buffer.unbind(0) if stacked else [buffer], self.parts):
            view.copy_(part, non_blocking=True)
        return self._replace(values=buffer)


def stacked_name(name: str) -> tuple[str, int] | None:
    """The name of the stack that a tensor of a block belongs to, and the number of the block."""
    match = _IN_A_BLOCK.fullmatch(name)
    return (f"{match[1]}*{match[3]}", int(match[2])) if match else None


def is_stack(name: str) -> bool:
    """Whether a stored tensor is one of all blocks."""
    return "layers.*." in name


def name_in_block(stack: str, block: int) -> str:
    """The inverse of `stacked_name`."""
    return stack.replace("layers.*.", f"layers.{block}.", 1)


def stored_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[Stored, list[torch.Tensor]]:
    """What a checkpoint stores for a run's tensors, with the tensors in the order of their blocks."""
    found: dict[Stored, list[torch.Tensor]] = {}
    for name, members in _stacks(tensors):
        first = members[0]
        size = tuple(first.shape) if name in tensors else (len(members), *first.shape)
        found[Stored(name, size, first.dtype)] = members
    return found


def owned_pieces(stored: Mapping[Stored, list[torch.Tensor]], rank: int) -> list[Piece]:
    """What this rank is to write: the parts that no rank before it holds. rank: the global one.

    Every mesh is a slice of the world. Where a tensor does not know a dimension of the world (norms know no tp), each
    slice holds the whole of it, and that with rank 0 comes first.
    """
    meshes = {id(m[0].device_mesh): m[0].device_mesh for m in stored.values() if isinstance(m[0], DTensor)}
    first = {key for key, mesh in meshes.items() if mesh.mesh.min() == 0}
    return [piece for tensor, members in stored.items() for piece in _own(tensor, members, rank, first)]


def _stacks(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Names and members of what is stored; tensors that have no like in every block stay as they are."""
    blocks: dict[str, dict[int, str]] = {}
    for name in tensors:
        if place := stacked_name(name):
            blocks.setdefault(place[0], {})[place[1]] = name
    left = dict(tensors)
    for stack, names in blocks.items():
        members = [tensors[names[block]] for block in sorted(names)]
        if sorted(names) == list(range(len(names))) and _alike(members):
            for name in names.values():
                del left[name]
            yield stack, members
    yield from ((name, [tensor]) for name, tensor in left.items())


def _alike(members: list[torch.Tensor]) -> bool:
    """Whether they can be one tensor: more than one, in the same parts on the same ranks."""
    first, spec = members[0], getattr(members[0], "_spec", None)
    return len(members) > 1 and all(
        (other.shape, other.dtype) == (first.shape, first.dtype) and getattr(other, "_spec", None) == spec
        for other in members[1:]
    )


def _own(tensor: Stored, members: list[torch.Tensor], rank: int, first_meshes: set[int]) -> Iterator[Piece]:
    first = members[0]
    if isinstance(first, DTensor):
        if id(first.device_mesh) not in first_meshes or not first_holder(first):
            return
        sizes, offsets = compute_local_shape_and_global_offset(first.shape, first.device_mesh, first.placements)
        largest = _largest_part(first)
    elif rank == 0:
        sizes, offsets, largest = first.shape, (0,) * first.dim(), first.numel()
    else:
        return
    if not math.prod(sizes):
        return
    local = [member.to_local() if isinstance(member, DTensor) else member for member in members]
    if len(tensor.size) == first.dim():
        yield Piece(tensor, tuple(offsets), tuple(sizes), local)
        return
    at_a_time = max(1, PIECE_BYTES // (largest * tensor.dtype.itemsize))
    for block in range(0, len(local), at_a_time):
        parts = local[block : block + at_a_time]
        yield Piece(tensor, (block, *offsets), (len(parts), *sizes), parts)


def first_holder(tensor: DTensor) -> bool:
    """Whether this rank is the first of those on the tensor's mesh that hold the same part."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return not any(at for at, placement in zip(coordinate, tensor.placements) if placement.is_replicate())


def _largest_part(tensor: DTensor) -> int:
    """Elements of the largest shard: the same on every rank, so that all cut their stacks alike."""
    shape = list(tensor.shape)
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            split = cast(Shard, placement).dim
            shape[split] = -(-shape[split] // tensor.device_mesh.size(dim))
    return max(1, math.prod(shape))
