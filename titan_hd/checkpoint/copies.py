"""Parts of a checkpoint that several ranks hold: the first of them reads, and sends the others what it has read.

Such are the shards of W on replicas, and what workers that share an adapter hold of it. On a file system that all nodes
share, a checkpoint is so read once, however many replicas there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_hd.checkpoint.pieces import first_holder
from titan_hd.distributed.collectives import broadcast
from titan_hd.distributed.watch import waiting

# Of what travels at a time: small tensors together, large ones in parts.
BUCKET_BYTES = 2**26


def to_read(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this rank reads: of DTensors what no rank before it holds; of others everything."""
    return {key: t for key, t in tensors.items() if not isinstance(t, DTensor) or first_holder(t)}


@torch.no_grad()
def send_copies(tensors: Iterable[torch.Tensor]) -> None:
    """Fill the parts of DTensors that are not in `to_read` from those that are. Collective: all ranks have the same
    tensors, in the same order."""
    alike: dict[tuple[DeviceMesh, tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor) and (dims := _shared_dims(tensor)):
            local = tensor.to_local()
            assert local.is_contiguous()
            alike.setdefault((tensor.device_mesh, dims, tensor.dtype), []).append(local.view(-1))
    for (mesh, dims, dtype), parts in alike.items():
        for bucket in _buckets(parts, BUCKET_BYTES // dtype.itemsize):
            _send(bucket, mesh, dims)


def _shared_dims(tensor: DTensor) -> tuple[int, ...]:
    """Dimensions of the mesh along which ranks hold the same."""
    mesh = tensor.device_mesh
    return tuple(dim for dim, at in enumerate(tensor.placements) if at.is_replicate() and mesh.size(dim) > 1)


def _buckets(parts: list[torch.Tensor], room: int) -> Iterator[list[torch.Tensor]]:
    """Flat parts in their order, cut so that a bucket has at most so many elements."""
    bucket: list[torch.Tensor] = []
    left = room
    for part in parts:
        while part.numel():
            bucket.append(part[:left])
            part, left = part[left:], left - bucket[-1].numel()
            if not left:
                yield bucket
                bucket, left = [], room
    if bucket:
        yield bucket


def _send(bucket: list[torch.Tensor], mesh: DeviceMesh, dims: tuple[int, ...]) -> None:
    """Along one dimension after the other, from the ranks that are first in all that follow. The groups have the
    backend of the device that computes, even where the parts lie on the host."""
    at = mesh.get_coordinate()
    assert at is not None  # who has a part is on its mesh
    flat = torch.cat(bucket).to(mesh.device_type)
    for n, dim in enumerate(dims):
        if not any(at[later] for later in dims[n + 1 :]):
            with waiting():
                broadcast(flat, mesh.get_group(dim)).wait()
    if any(at[dim] for dim in dims):
        for part, values in zip(bucket, flat.split([part.numel() for part in bucket])):
            part.copy_(values)
