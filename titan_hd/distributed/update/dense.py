"""The dense exchange: every worker forms its adapters' update and reduce-scatters it onto the shards.

Cheaper than factors only where K*r comes near min(out, in). In words, for one weight whose rows are cut into dp_shard
equal chunks, the last ones padded: take the next few rows of every chunk; form those rows of c * sum over the hosted
adapters of [dB_i A_i + (B_i + dB_i) dA_i]; reduce-scatter them over dp_shard; all-reduce what arrived over
dp_replicate; and so on, until the chunk is complete. No worker ever holds [out, in]. Where g workers share an adapter,
each contributes 1/g of its update.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from titan_hd.distributed.collectives import all_reduce, reduce_scatter
from titan_hd.distributed.update.apply import factored_update


@dataclass(frozen=True)
class DenseGroups:
    """Process groups of this worker along dp_shard and dp_replicate, with their sizes."""

    shard: dist.ProcessGroup
    shards: int
    replicate: dist.ProcessGroup | None
    replicas: int


# What travels at a time, in bytes of fp32: enough to fill the links of GPUs, little enough for the caches of CPUs.
_PIECE_BYTES = {"cuda": 2**26, "cpu": 2**22}


def rows_at_a_time(chunk: int, width: int, shards: int, device_type: str) -> int:
    """Rows of each chunk [chunk, width] that travel together."""
    return min(chunk, max(1, _PIECE_BYTES.get(device_type, 2**26) // (4 * shards * width)))


def exchange_dense(
    a: torch.Tensor,
    b: torch.Tensor,
    da: torch.Tensor,
    db: torch.Tensor,
    coefficient: float,
    groups: DenseGroups,
    wire: torch.dtype,
) -> Generator[None, None, torch.Tensor]:
    """This worker's rows of the whole update, padded to a full chunk [chunk, in], fp32; yields while pieces travel.

    a, da [k, r, in], b, db [k, out, r]: the hosted adapters. `fold.bucket_bytes` says what is held meanwhile.
    """
    stack = lambda t: t.transpose(0, 1).flatten(1)  # noqa: E731  [k, out, r] -> [out, k*r]
    left, right = factored_update(a.flatten(0, 1), stack(b), da.flatten(0, 1), stack(db))
    right.mul_(coefficient)
    chunk = -(-left.shape[0] // groups.shards)
    padding = chunk * groups.shards - left.shape[0]
    left = (F.pad(left, (0, 0, 0, padding)) if padding else left).view(groups.shards, chunk, -1)
    rows = right.new_empty(chunk, right.shape[1])
    step = rows_at_a_time(*rows.shape, groups.shards, rows.device.type)
    for first in range(0, chunk, step):
        update = (left[:, first : first + step].flatten(0, 1) @ right).to(wire)
        arrived = yield from _sum_over_workers(update, groups)
        rows[first : first + step] = arrived
        del update, arrived  # a generator's variables live as long as it waits
    return rows


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
