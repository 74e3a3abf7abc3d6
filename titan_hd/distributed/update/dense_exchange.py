"""The dense route at work.

In words, for one weight whose rows are cut into dp_shard equal chunks, the last ones padded: take the next few rows of
every chunk; form those rows of c * sum over the hosted adapters of [dB_i A_i + (B_i + dB_i) dA_i]; reduce-scatter them
over dp_shard; all-reduce what arrived over dp_replicate; and so on, until the chunk is complete. No worker ever holds
[out, in]. Where g workers share an adapter, each contributes 1/g of its update.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from titan_hd.distributed.collectives import all_reduce, reduce_scatter
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.row_shards import chunk_rows
from titan_hd.distributed.update.apply import RowsUpdate, factored_update
from titan_hd.distributed.update.route import Exchange, HostedFactors


@dataclass(frozen=True)
class DenseGroups:
    """Process groups of this worker along dp_shard and dp_replicate, with their sizes."""

    shard: dist.ProcessGroup
    shards: int
    replicate: dist.ProcessGroup
    replicas: int


class DenseExchange(Exchange):
    """piece_rows: (rows of a chunk, columns, shards, device type) -> how many rows of each chunk travel together."""

    def __init__(
        self,
        mesh: DeviceMesh,
        dims: ParallelDims,
        coefficient: float,
        wire: torch.dtype,
        piece_rows: Callable[[int, int, int, str], int],
    ):
        self._share = coefficient / mesh.size(1)  # workers that share an adapter send a part each
        self._wire, self._piece_rows = wire, piece_rows
        shard, replicate = dims.world.get_group("dp_shard"), dims.world.get_group("dp_replicate")
        self._groups = DenseGroups(shard, dims.dp_shard, replicate, dims.dp_replicate)

    def travel(self, names: Sequence[str], local: Sequence[HostedFactors]) -> Generator[None, None, list[RowsUpdate]]:
        (hosted,) = local
        left, right = factored_update(
            hosted.a.flatten(0, 1), _stack(hosted.b), hosted.da.flatten(0, 1), _stack(hosted.db)
        )
        right.mul_(self._share)
        shards = self._groups.shards
        chunk = chunk_rows(left.shape[0], shards)
        padding = chunk * shards - left.shape[0]
        left = (F.pad(left, (0, 0, 0, padding)) if padding else left).view(shards, chunk, -1)
        rows = right.new_empty(chunk, right.shape[1])
        step = self._piece_rows(chunk, right.shape[1], shards, rows.device.type)
        for first in range(0, chunk, step):
            update = (left[:, first : first + step].flatten(0, 1) @ right).to(self._wire)
            arrived = yield from _sum_over_workers(update, self._groups)
            rows[first : first + step] = arrived
            del update, arrived  # a generator's variables live as long as it waits
        return [RowsUpdate(rows)]


def _stack(factor: torch.Tensor) -> torch.Tensor:
    """[k, out, r] -> [out, k*r]"""
    return factor.transpose(0, 1).flatten(1)


def _sum_over_workers(update: torch.Tensor, groups: DenseGroups) -> Generator[None, None, torch.Tensor]:
    """[shards * n, in] of every worker -> the sum's own [n, in] of this worker's shard."""
    if groups.shards > 1:
        update, work = reduce_scatter(update, groups.shards, groups.shard)
        yield
        work.wait()
    if groups.replicas > 1:
        work = all_reduce(update, groups.replicas, groups.replicate)
        yield
        work.wait()
    return update
