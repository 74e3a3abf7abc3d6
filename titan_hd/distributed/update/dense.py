"""The dense exchange: every worker forms its adapters' update in full and reduce-scatters it onto the shards.

Cheaper than factors only where K*r comes near min(out, in). In words, for one weight: form c * sum over the hosted
adapters of [dB_i A_i + (B_i + dB_i) dA_i] as [out, in], padded to equal chunks of rows; reduce-scatter it over
dp_shard; all-reduce what arrived over dp_replicate. Where g workers share an adapter, each contributes 1/g of its
update.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from titan_hd.distributed.collectives import all_reduce, reduce_scatter
from titan_hd.distributed.update.apply import factored_update


@dataclass(frozen=True)
class DenseGroups:
    """Process groups of this worker along dp_shard and dp_replicate, with their sizes."""

    shard: dist.ProcessGroup
    shards: int
    replicate: dist.ProcessGroup | None
    replicas: int


def exchange_dense(
    a: torch.Tensor,
    b: torch.Tensor,
    da: torch.Tensor,
    db: torch.Tensor,
    coefficient: float,
    groups: DenseGroups,
    wire: torch.dtype,
) -> Generator[None, None, torch.Tensor]:
    """This worker's rows of the whole update, padded to a full chunk [chunk, in], fp32; yields while it travels.

    a, da [k, r, in], b, db [k, out, r]: the hosted adapters. Memory while in flight: one [out, in] and one [chunk, in]
    in the wire's dtype.
    """
    stack = lambda t: t.transpose(0, 1).flatten(1)  # noqa: E731  [k, out, r] -> [out, k*r]
    left, right = factored_update(a.flatten(0, 1), stack(b), da.flatten(0, 1), stack(db))
    out_features, width = left.shape[0], right.shape[1]
    chunk = -(-out_features // groups.shards)
    update = left.new_empty(chunk * groups.shards, width, dtype=wire)
    update[out_features:].zero_()
    right.mul_(coefficient)
    if wire == left.dtype:
        torch.mm(left, right, out=update[:out_features])
    else:
        update[:out_features] = left @ right
    del left, right  # a generator's variables live as long as it waits
    if groups.shards > 1:
        rows, work = reduce_scatter(update, groups.shards, groups.shard)
        del update
        yield
        work.wait()
    else:
        rows = update
    if groups.replicas > 1:
        work = all_reduce(rows, groups.replicas, groups.replicate)
        yield
        work.wait()
    return rows.float()
