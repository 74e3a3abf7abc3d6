"""The factors exchange: low-rank factors travel, each worker multiplies out only the rows of W that it owns.

In words, for the weights of one bucket, K adapters dealt to n holders, and W's rows sharded over dp_shard workers:

1. every holder sends its dA_i [r, in] of all the bucket's weights to all holders, in one all-gather;
2. every holder sends to each other one m the rows of its dB_i that m owns, rows_m, in one all-to-all. Rows are cut into
   equal chunks, the last ones padded, so that uneven and empty shards need no sizes of their own;
3. when both have arrived, every worker adds  c * [dB | B + dB] [A ; dA]  to its rows of each weight: one product of
   inner size 2*K*r per weight.

A of all adapters and rows_m of every B never change: they travel once, by the same functions, if they are cached,
and else beside dA and dB in every step. Where workers share an adapter (K < W), the holders are the workers of one
place in their groups; each such set of n = K holders runs the exchange by itself. Under HSDP each worker asks for the
rows of its own shard, so replicas need no step of their own.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from titan_hd.distributed.collectives import all_gather, all_to_all


@dataclass(frozen=True)
class ExchangeGroup:
    """The holders that exchange with each other: their process group, the shard of W that each of them owns."""

    group: dist.ProcessGroup
    shard_of_holder: tuple[int, ...]
    shards: int
    rank: int

    @property
    def size(self) -> int:
        return len(self.shard_of_holder)

    def rows(self, out_features: int) -> tuple[int, int]:
        """First row and number of rows of W that this worker owns."""
        chunk = -(-out_features // self.shards)
        first = min(out_features, self.shard_of_holder[self.rank] * chunk)
        return first, min(out_features, first + chunk) - first


Factors = list[tuple[torch.Tensor, torch.Tensor]]


def exchange_factors(local: Factors, group: ExchangeGroup, wire: torch.dtype) -> Generator[None, None, Factors]:
    """All adapters' factors of several weights, from those of the hosted adapters; yields while they travel.

    local: per weight, a [k, r, in] and b [k, out, r]. Returns, per weight, a [K*r, in] and this worker's rows of b
    [rows, K*r], in fp32. Memory while in flight: what is sent, n times what is sent of a, and once more what is sent of
    b; `wire` is the dtype on the way.
    """
    if group.size == 1:
        # Rounded as on the way, so that the result does not depend on the number of workers.
        return [(a.flatten(0, 1).to(wire).float(), _own_rows(b, group).to(wire).float()) for a, b in local]
    a_send = torch.cat([a.to(wire).reshape(-1) for a, _ in local])
    b_send = torch.cat([_rows_for_holders(b, group).to(wire) for _, b in local], dim=1)
    a_all, a_work = all_gather(a_send, group.size, group.group)
    b_all, b_work = all_to_all(b_send, group.group)
    yield
    a_work.wait()
    b_work.wait()
    a_parts = a_all.float().split([a.numel() for a, _ in local], dim=1)
    b_parts = b_all.float().split([_padded_size(b, group) for _, b in local], dim=1)
    return [
        (a_part.reshape(-1, a.shape[2]), _unpack_rows(b_part, b, group))
        for (a, b), a_part, b_part in zip(local, a_parts, b_parts)
    ]


def _own_rows(b: torch.Tensor, group: ExchangeGroup) -> torch.Tensor:
    """[k, out, r] -> this worker's [rows, k*r]: one adapter shared by all workers, or one worker."""
    first, rows = group.rows(b.shape[1])
    return b[:, first : first + rows].transpose(0, 1).flatten(1)


def _padded_size(b: torch.Tensor, group: ExchangeGroup) -> int:
    k, out_features, r = b.shape
    return k * -(-out_features // group.shards) * r


def _rows_for_holders(b: torch.Tensor, group: ExchangeGroup) -> torch.Tensor:
    """b [k, out, r] -> [n, k * chunk * r]: line m is what holder m owns of it, padded to a full chunk."""
    k, out_features, r = b.shape
    chunk = -(-out_features // group.shards)
    padded = F.pad(b, (0, 0, 0, chunk * group.shards - out_features))
    per_shard = padded.view(k, group.shards, chunk, r).transpose(0, 1).flatten(1)
    if group.shard_of_holder == tuple(range(group.shards)):
        return per_shard
    return per_shard[torch.tensor(group.shard_of_holder, device=b.device)]


def _unpack_rows(received: torch.Tensor, b: torch.Tensor, group: ExchangeGroup) -> torch.Tensor:
    """[n, k * chunk * r] from all holders -> this worker's rows [rows, K*r]."""
    k, out_features, r = b.shape
    _, rows = group.rows(out_features)
    chunk = -(-out_features // group.shards)
    return received.reshape(group.size * k, chunk, r)[:, :rows].transpose(0, 1).flatten(1)
