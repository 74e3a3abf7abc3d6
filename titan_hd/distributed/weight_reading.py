"""Blocks of weights from files to all ranks that hold them, each byte read once in the whole cluster.

Replicas hold the same shards, and so do tp ranks of what is not split over them. The first rank that holds a block
(`ParallelDims.first_copy`) reads it. It travels as it lies in the file, in buckets: by one broadcast over the replicas
and, where tp ranks hold the same, from the first one of every replica to its others by another. Whoever has a bucket
converts it to the dtype of its shards. While a bucket travels, the next one is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from titan_hd.distributed.collectives import broadcast
from titan_hd.distributed.parallel_dims import Block, ParallelDims
from titan_hd.errors import UserError
from titan_hd.models.hf_files import WeightFiles
from titan_hd.models.staging import PIECE_BYTES, Slot, Staging


class Part(NamedTuple):
    """What this rank holds of a weight. split: the dimension that tp splits, or None; target: where its values go,
    [rows, columns], [rows] of a vector, or with a row's columns as several dimensions."""

    name: str
    block: Block
    split: int | None
    target: torch.Tensor


class _Piece(NamedTuple):
    """Rows of a part in a bucket: `rows` of them from `row` on, in the bytes from `start` to `stop`."""

    part: Part
    row: int
    rows: int
    start: int
    stop: int


class _Route(NamedTuple):
    """How blocks come to a rank: it reads them, or not; the groups over whose members they then go, one after another,
    from the first member."""

    reads: bool
    groups: list[dist.ProcessGroup]


def read_parts(
    files: WeightFiles, parts: Sequence[Part], dims: ParallelDims, device: torch.device, tell: Callable[[], object]
) -> None:
    """Fill the targets of all parts of this rank. Collective: all ranks have the same weights in the same order.

    device: of the targets. tell: called now and then.

    Raises:
        UserError: on the rank that could not read a value, when it has sent all the same what the others wait for.
    """
    faults: list[UserError] = []
    for split_over_tp in (True, False):
        some = [part for part in parts if (part.split is not None) == split_over_tp]
        route = _route(dims, split_over_tp)
        # Groups have the backend of the device that computes, even where the shards lie on the host.
        staging = Staging(torch.device(dims.device_type), 2) if route.groups else Staging(device)
        under_way: deque[tuple[list[_Piece], Slot, dist.Work | None]] = deque()
        for bucket in _buckets(some, files):
            slot = staging.next(bucket[-1].stop)
            if route.reads and not faults:
                _read(files, bucket, slot, faults)
            under_way.append((bucket, slot, _send(slot, route)))
            if len(under_way) == len(staging.slots):
                _arrive(files, *under_way.popleft())
            tell()
        while under_way:
            _arrive(files, *under_way.popleft())
    if faults:
        raise faults[0]


def _route(dims: ParallelDims, split_over_tp: bool) -> _Route:
    """Of blocks that tp ranks have parts of, or of those that they all hold."""
    groups = []
    if dims.dp_replicate > 1 and (split_over_tp or dims.tp_rank == 0):
        groups.append(dims.world.get_group("dp_replicate"))
    if dims.tp > 1 and not split_over_tp:
        groups.append(dims.world.get_group("tp"))
    return _Route(dims.first_copy(dims.rank, 0 if split_over_tp else None), groups)


def _buckets(parts: Sequence[Part], files: WeightFiles) -> Iterator[list[_Piece]]:
    """The parts' rows in order, in buckets of at most 16 MiB or one row: alike on all ranks that hold the same."""
    bucket: list[_Piece] = []
    for part in parts:
        item = files.dtype(part.name).itemsize
        width, row = part.block.columns * item, 0  # bytes of a row
        while row < part.block.rows:
            start = -(-bucket[-1].stop // item) * item if bucket else 0  # else the bytes could not be seen as numbers
            room = (PIECE_BYTES - start) // width
            if bucket and room <= 0:
                yield bucket
                bucket = []
                continue
            rows = min(part.block.rows - row, max(1, room))
            bucket.append(_Piece(part, row, rows, start, start + rows * width))
            row += rows
    if bucket:
        yield bucket


def _read(files: WeightFiles, bucket: list[_Piece], slot: Slot, faults: list[UserError]) -> None:
    """Onto the host. After a fault the rest is not read: what is sent means nothing then, and all ranks are told."""
    for (name, block, _, target), row, rows, start, stop in bucket:
        try:
            files.read_bytes(name, slot.on_host()[start:stop], block.row + row, rows, block.column, target.dtype)
        except UserError as error:
            faults.append(error)
            return


def _send(slot: Slot, route: _Route) -> dist.Work | None:
    """Start a bucket's way over the groups; what to wait for."""
    there = slot.sent() if route.reads else slot.on_device()
    work = None
    for group in route.groups:
        if work is not None:
            work.wait()
        work = broadcast(there, group)
    return work


def _arrive(files: WeightFiles, bucket: list[_Piece], slot: Slot, work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
    there = slot.on_device()
    for part, row, rows, start, stop in bucket:
        target = part.target[row : row + rows]
        target.copy_(there[start:stop].view(files.dtype(part.name)).view(target.shape))
    slot.release()
