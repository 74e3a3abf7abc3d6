"""The factors route at work.

In words, for the weights of one bucket, K adapters dealt to n holders, and W's rows sharded over dp_shard workers:

1. every holder sends its dA_i [r, in] of all the bucket's weights to all holders, in one all-gather;
2. every holder sends to each other one m the rows of its dB_i that m owns, rows_m, in one all-to-all. Rows are cut into
   equal chunks, the last ones padded, so that uneven and empty shards need no sizes of their own. Where both travel as
   int8, the scales of all rows of dA_i and columns of dB_i go to all holders, in another all-gather;
3. when all have arrived, every worker adds  c * [dB | B + dB] [A ; dA]  to its rows of each weight: one product of
   inner size 2*K*r per weight.

A of all adapters and rows_m of every B stay the same for many steps: if they are cached, they travel by the same
functions when they are new, and else after dA and dB in every step. Where K < W, the workers with the same index in
their sharing group are a set of n = K holders that exchanges on its own. Under HSDP each worker asks for the rows of
its own shard, so replicas need no step of their own.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from titan_hd.distributed.collectives import all_gather, all_to_all
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.row_shards import chunk_rows, shard_rows
from titan_hd.distributed.update.apply import FactoredUpdate
from titan_hd.distributed.update.route import Exchange, HostedFactors
from titan_hd.distributed.update.runtime import Task

Factors = list[tuple[torch.Tensor, torch.Tensor]]


class FactorsExchange(Exchange):
    """cached: A [K*r, in] and this worker's rows of B [rows, K*r] of the prepared weights, by name."""

    def __init__(self, mesh: DeviceMesh, dims: ParallelDims, coefficient: float, wire: torch.dtype):
        self._coefficient, self._wire = coefficient, wire
        self._group, self._size = mesh.get_group("adapter"), mesh.size(0)
        self._shards, self._own_shard = dims.dp_shard, dims.place(dims.rank).shard
        shards = [dims.place(rank).shard for rank in mesh["adapter"].mesh.tolist()]
        # An index on the device, made once; None where line m is holder m's already.
        in_order = shards == list(range(self._shards))
        self._shard_of_holder = None if in_order else torch.tensor(shards, device=mesh.device_type)
        self.cached: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def prepare(self, names: Sequence[str], local: Sequence[HostedFactors]) -> Task:
        fixed = yield from self._gather([(f.a, f.b) for f in local], torch.float32)
        self.cached.update(zip(names, fixed))

    def travel(
        self, names: Sequence[str], local: Sequence[HostedFactors]
    ) -> Generator[None, None, list[FactoredUpdate]]:
        if local[0].scales is None:
            deltas = yield from self._gather([(f.da, f.db) for f in local], self._wire)
        else:
            deltas = yield from self._gather_scaled(local)
        if names[0] in self.cached:
            fixed = [self.cached[name] for name in names]
        else:  # always in fp32, as the cached ones
            fixed = yield from self._gather([(f.a, f.b) for f in local], torch.float32)
        return [FactoredUpdate(a, b, da, db, self._coefficient) for (a, b), (da, db) in zip(fixed, deltas)]

    def _gather_scaled(self, local: Sequence[HostedFactors]) -> Generator[None, None, Factors]:
        """`_gather` of int8 dA and dB with their scales, multiplied."""
        scales = torch.stack([f.scales.flatten(1) for f in local if f.scales is not None])  # [weights, 2, k*r]
        everyones = work = None
        if self._size > 1:
            everyones, work = all_gather(scales.flatten(), self._size, self._group)
        deltas = yield from self._gather([(f.da, f.db) for f in local], self._wire)
        if everyones is not None and work is not None:
            work.wait()
            scales = everyones.view(self._size, *scales.shape).permute(1, 2, 0, 3).flatten(2)
        for (da, db), (of_rows, of_columns) in zip(deltas, scales):
            da.mul_(of_rows[:, None])
            db.mul_(of_columns)
        return deltas

    def _gather(self, local: Factors, wire: torch.dtype) -> Generator[None, None, Factors]:
        """All adapters' factors of several weights, from those of the hosted adapters; yields while they travel.

        local: per weight, a [k, r, in] and b [k, out, r]. Returns, per weight, a [K*r, in] and this worker's rows of b
        [rows, K*r], in fp32. Memory while in flight: what is sent, n times what is sent of a, and once more what is
        sent of b; `wire` is the dtype on the way.
        """
        if self._size == 1:
            # Rounded as on the way, so that the result does not depend on the number of workers.
            return [(a.flatten(0, 1).to(wire).float(), self._own_rows_of(b).to(wire).float()) for a, b in local]
        a_send = torch.cat([a.to(wire).reshape(-1) for a, _ in local])
        b_send = torch.cat([self._rows_for_holders(b).to(wire) for _, b in local], dim=1)
        a_all, a_work = all_gather(a_send, self._size, self._group)
        b_all, b_work = all_to_all(b_send, self._group)
        yield
        a_work.wait()
        b_work.wait()
        a_parts = a_all.float().split([a.numel() for a, _ in local], dim=1)
        b_parts = b_all.float().split([self._padded_size(b) for _, b in local], dim=1)
        return [
            (a_part.reshape(-1, a.shape[2]), self._unpack_rows(b_part, b))
            for (a, b), a_part, b_part in zip(local, a_parts, b_parts)
        ]

    def _own_rows(self, out_features: int) -> tuple[int, int]:
        return shard_rows(out_features, self._shards, self._own_shard)

    def _own_rows_of(self, b: torch.Tensor) -> torch.Tensor:
        """[k, out, r] -> this worker's [rows, k*r]: one adapter shared by all workers, or one worker."""
        first, last = self._own_rows(b.shape[1])
        return b[:, first:last].transpose(0, 1).flatten(1)

    def _padded_size(self, b: torch.Tensor) -> int:
        k, out_features, r = b.shape
        return k * chunk_rows(out_features, self._shards) * r

    def _rows_for_holders(self, b: torch.Tensor) -> torch.Tensor:
        """b [k, out, r] -> [n, k * chunk * r]: line m is what holder m owns of it, padded to a full chunk."""
        k, out_features, r = b.shape
        chunk = chunk_rows(out_features, self._shards)
        padded = F.pad(b, (0, 0, 0, chunk * self._shards - out_features))
        per_shard = padded.view(k, self._shards, chunk, r).transpose(0, 1).flatten(1)
        return per_shard if self._shard_of_holder is None else per_shard.index_select(0, self._shard_of_holder)

    def _unpack_rows(self, received: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """[n, k * chunk * r] from all holders -> this worker's rows [rows, K*r]."""
        k, out_features, r = b.shape
        first, last = self._own_rows(out_features)
        lines = received.reshape(self._size * k, chunk_rows(out_features, self._shards), r)
        return lines[:, : last - first].transpose(0, 1).flatten(1)
