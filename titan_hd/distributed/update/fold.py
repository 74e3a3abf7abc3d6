"""Fold: what the optimizer added to every adapter goes onto the shards of W, and the adapters are zero again."""

from __future__ import annotations

import logging
from collections.abc import Generator

import torch
import torch.distributed as dist

from titan_hd.distributed.adapter_registry import AdapterEntry, AdapterRegistry
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.update.apply import Rounding, add_product, add_rows, factored_update
from titan_hd.distributed.update.dense import DenseGroups, exchange_dense, rows_at_a_time
from titan_hd.distributed.update.factors import ExchangeGroup, exchange_factors
from titan_hd.distributed.update.plan import UpdatePlan
from titan_hd.distributed.update.rounding import rounding_key
from titan_hd.distributed.update.runtime import Task, run_tasks
from titan_hd.errors import UserError

logger = logging.getLogger("titan_hd")


class Fold:
    """W <- (1 - lr * weight_decay) W + c * sum_i [dB_i A_i + (B_i + dB_i) dA_i], then dA_i = dB_i = 0.

    Buckets of the plan are tasks: while the collectives of one are under way, the products of the one before run. Extra
    memory: the cached static factors, and what `bucket_bytes` says of `in_flight` buckets.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        dims: ParallelDims,
        plan: UpdatePlan,
        aggregate: str = "mean",
        weight_decay: float = 0.0,
        seed: int = 0,
        wire: torch.dtype = torch.float32,
        in_flight: int = 2,
    ):
        self.registry, self.plan, self.seed, self.wire = registry, plan, seed, wire
        self.coefficient = 1.0 / registry.num_adapters if aggregate == "mean" else 1.0
        self.weight_decay, self.in_flight = weight_decay, in_flight
        self._routes = {w.name: w for w in plan.weights}
        holders = registry.mesh["adapter"].mesh.tolist()  # global ranks that exchange with this one
        self._holders = ExchangeGroup(
            registry.mesh.get_group("adapter"),
            tuple(dims.place(rank)[1] for rank in holders),
            dims.dp_shard,
            registry.mesh.get_local_rank("adapter"),
        )
        self._dense = DenseGroups(
            dims.world.get_group("dp_shard"),
            dims.dp_shard,
            dims.world.get_group("dp_replicate") if dims.dp_replicate > 1 else None,
            dims.dp_replicate,
        )
        self._tp_rank = dims.tp_rank
        self._static: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def prepare(self) -> None:
        """Compare plans over all ranks, then send the static factors that are to be cached.

        Raises:
            ValueError: on every rank, if ranks disagree on the plan.
        """
        check_same_plan(self.plan)

        def gather(bucket: tuple[str, ...]) -> Task:
            static = [self._local(self.registry.entries[name])[:2] for name in bucket]
            arrived = yield from exchange_factors(static, self._holders, torch.float32)
            self._static.update(zip(bucket, arrived))

        run_tasks((gather(b) for b in self.plan.buckets if self._routes[b[0]].cached), self.in_flight)

    @torch.no_grad()
    def __call__(self, lr: float, step: int) -> None:
        """Update every adapted weight in place. lr scales the weight decay; step keys the stochastic rounding.

        Raises:
            FloatingPointError: on every rank and before W is touched, if an adapter's update is not finite.
        """
        check_finite(self.registry, "update", step)
        run_tasks((self._task(bucket, lr, step) for bucket in self.plan.buckets), self.in_flight)

    def _task(self, bucket: tuple[str, ...], lr: float, step: int) -> Task:
        decay = lr * self.weight_decay
        if self._routes[bucket[0]].route == "dense":
            yield from self._dense_task(bucket[0], decay, step)
        else:
            yield from self._factors_task(bucket, decay, step)

    def _factors_task(self, bucket: tuple[str, ...], decay: float, step: int) -> Generator:
        entries = [self.registry.entries[name] for name in bucket]
        local = [self._local(entry) for entry in entries]
        send = [(da, db) for _, _, da, db in local]
        deltas = yield from exchange_factors(send, self._holders, self.wire)
        if bucket[0] in self._static:
            static = [self._static[name] for name in bucket]
        else:  # always in fp32, as the cached ones
            fixed = [(a, b) for a, b, _, _ in local]
            static = yield from exchange_factors(fixed, self._holders, torch.float32)
        for name, entry, (a, b), (da, db) in zip(bucket, entries, static, deltas):
            rows = entry.weight_rows()
            if rows.numel():
                left, right = factored_update(a, b, da, db)
                add_product(rows, left, right, self.coefficient, decay, self._rounding(name, entry, step))
            self._zero(entry)

    def _dense_task(self, name: str, decay: float, step: int) -> Generator:
        entry = self.registry.entries[name]
        share = self.coefficient / self.registry.mesh.size(1)  # workers that share an adapter send a part each
        update = yield from exchange_dense(*self._local(entry), share, self._dense, self.wire)
        rows = entry.weight_rows()
        if rows.numel():
            add_rows(rows, update[: len(rows)], decay, self._rounding(name, entry, step))
        self._zero(entry)

    def _rounding(self, name: str, entry: AdapterEntry, step: int) -> Rounding:
        row, _ = self._holders.rows(entry.local_shape[0])
        offset = {0: (entry.local_shape[0], 0), 1: (0, entry.local_shape[1]), None: (0, 0)}[entry.split]
        key = rounding_key(self.seed, step, name)
        return Rounding(key, row + self._tp_rank * offset[0], self._tp_rank * offset[1])

    @staticmethod
    def _local(entry: AdapterEntry) -> tuple[torch.Tensor, ...]:
        tensors = (entry.a, entry.b, entry.layer.delta_A, entry.layer.delta_B)
        return tuple(t.to_local() for t in tensors)

    @staticmethod
    def _zero(entry: AdapterEntry) -> None:
        entry.layer.delta_A.to_local().zero_()
        entry.layer.delta_B.to_local().zero_()


def check_same_plan(plan: UpdatePlan) -> None:
    """ValueError on every rank if the ranks' plans differ: they would wait for different collectives.

    Two numbers travel, whatever the number of ranks.
    """
    mine = torch.tensor(int(plan.digest()[:15], 16))
    first = mine.clone()
    dist.broadcast(first, src=0)
    different = torch.tensor(dist.get_world_size() if torch.equal(mine, first) else dist.get_rank())
    dist.all_reduce(different, op=dist.ReduceOp.MIN)
    if different < dist.get_world_size():
        raise UserError(
            f"hdpissa.exchange: rank {different} plans another update than rank 0; "
            "all ranks need the same configuration, model and version"
        )


@torch.no_grad()
def check_finite(registry: AdapterRegistry, what: str, step: int) -> None:
    """FloatingPointError on every rank, naming the first weight whose adapters' `what` is not finite on any rank.

    what: "gradient" or "update" (the value after the optimizer's step); step: 0-based. One small all-reduce.
    """
    tensors, owners = [], []
    for index, entry in enumerate(registry.entries.values()):
        for parameter in (entry.layer.delta_A, entry.layer.delta_B):
            tensors.append((parameter.grad if what == "gradient" else parameter).to_local())
            owners.append(index)
    # Squares of fp32 do not overflow in float64, so that a norm is infinite or NaN exactly where an element is. (So
    # would the maximum norm be, but that is slow on a CPU.)
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))
    bad = torch.where(norms.isfinite(), len(registry.entries), torch.tensor(owners, device=norms.device))
    first = bad.min()
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if first.item() < len(registry.entries):
        name = list(registry.entries)[first.item()]
        raise FloatingPointError(f"step {step + 1}: the {what} of {name} is not finite; W is as it was before the step")


def bucket_bytes(
    plan: UpdatePlan, names: tuple[str, ...], wire_bytes: int, device_type: str = "cuda"
) -> tuple[int, int]:
    """Most memory in bytes that one bucket's task holds while it is under way, and what it needs besides to compute.

    All started tasks hold the first; one task at a time computes, so a fold needs at most the first of `in_flight`
    buckets and the second of one. Factors hold what is sent and received; computing unpacks it to fp32 and stacks left
    and right of one weight's product. Dense holds left and right, its rows of the update, and the piece that travels:
    what is sent, over gloo as much that is received, and the sum.
    """
    t = plan.topology
    weights = {w.name: w for w in plan.weights}
    m, local = t.num_adapters * t.rank, t.hosted * t.rank
    converts = wire_bytes != 4
    if weights[names[0]].route == "dense":
        out, width = weights[names[0]].shape
        chunk = t.chunk(out)
        step = rows_at_a_time(chunk, width, t.dp_shard, device_type)
        piece = step * t.dp_shard * width
        held = 8 * local * (chunk * t.dp_shard + width) + 4 * chunk * width + (2 * piece + step * width) * wire_bytes
        return held, 4 * local * (5 * out + 2 * step * t.dp_shard) + converts * 4 * piece
    held = unpacked = largest = 0
    for name in names:
        out, width = weights[name].shape
        chunk, copies = t.chunk(out), 1 if weights[name].cached else 2
        received = m * (width + chunk)
        sent = local * width + m * chunk
        held += (sent + received) * (wire_bytes + 4 * (copies - 1))
        unpacked += copies * received * 4 * (1 + converts)
        product = 4 * m * (2 * width + 3 * chunk)
        packing = copies * 3 * local * chunk * t.dp_shard * 4
        largest = max(largest, product, packing)
    return held, unpacked + largest
