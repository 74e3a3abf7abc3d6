"""The dense route at work.

In words, for one weight whose rows are cut into dp_shard equal chunks, the last ones padded: take the next few rows of
every chunk; form those rows of c * sum over the hosted adapters of [dB_i A_i + (B_i + dB_i) dA_i]; reduce-scatter them
over dp_shard; all-reduce what arrived over dp_replicate; and so on, until the chunk is complete. No worker ever holds
[out, in]. Where g workers share an adapter, each contributes 1/g of its update.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from titan_hd.distributed.collectives import all_reduce, reduce_scatter
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.row_shards import chunk_rows
from titan_hd.distributed.update.apply import RowsUpdate, factored_update
from titan_hd.distributed.update.route import Exchange, HostedFactors


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
        self._shards, self._replicas = dims.dp_shard, dims.dp_replicate
        self._shard_group, self._replica_group = (dims.world.get_group(name) for name in ("dp_shard", "dp_replicate"))

    def travel(self, names: Sequence[str], local: Sequence[HostedFactors]) -> Generator[None, None, list[RowsUpdate]]:
        """This worker's rows of the summed update of a bucket's one weight; yields while a sum is under way."""
        left, right = _stacked_update(*local)
        right.mul_(self._share)
        chunk = chunk_rows(left.shape[0], self._shards)
        padding = chunk * self._shards - left.shape[0]
        left = (F.pad(left, (0, 0, 0, padding)) if padding else left).view(self._shards, chunk, -1)
        rows = right.new_empty(chunk, right.shape[1])
        step = self._piece_rows(chunk, right.shape[1], self._shards, right.device.type)
        for first in range(0, chunk, step):
            update = (left[:, first : first + step].flatten(0, 1) @ right).to(self._wire)
            arrived = yield from self._sum_over_workers(update)
            rows[first : first + step] = arrived
            del update, arrived  # a generator's variables live as long as it waits
        return [RowsUpdate(rows)]

    def _sum_over_workers(self, update: torch.Tensor) -> Generator[None, None, torch.Tensor]:
        """[shards * n, in] of every worker -> the sum's own [n, in] of this worker's shard."""
        if self._shards > 1:
            update, work = reduce_scatter(update, self._shards, self._shard_group)
            yield
            work.wait()
        if self._replicas > 1:
            work = all_reduce(update, self._replicas, self._replica_group)
            yield
            work.wait()
        return update


def _stacked_update(hosted: HostedFactors) -> tuple[torch.Tensor, torch.Tensor]:
    da, db = hosted.deltas()
    return factored_update(hosted.a.flatten(0, 1), _stack(hosted.b), da.flatten(0, 1), _stack(db))


def _stack(factor: torch.Tensor) -> torch.Tensor:
    """[k, out, r] -> [out, k*r]"""
    return factor.transpose(0, 1).flatten(1)
