"""Fold: what the optimizer added to every adapter goes onto the shards of W, and the adapters are zero again.

(Where int8 travels they keep what it could not hold: `outgoing`.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from titan_hd.distributed.adapter_registry import AdapterRegistry
from titan_hd.distributed.named_ranges import named
from titan_hd.distributed.parallel_dims import ParallelDims, owned_block
from titan_hd.distributed.update.apply import Rounding
from titan_hd.distributed.update.outgoing import OUTGOING
from titan_hd.distributed.update.plan import Bucket, UpdatePlan
from titan_hd.distributed.update.rounding import rounding_key
from titan_hd.distributed.update.routes import ROUTES
from titan_hd.distributed.update.runtime import Task, run_tasks
from titan_hd.errors import UserError


@dataclass(frozen=True)
class FoldSettings:
    """How the adapters' updates are added up, and how many of the plan's buckets are under way together."""

    aggregate: str = "mean"  # over the shares of the global batch that are learned from apart; or "sum"
    weight_decay: float = 0.0  # of W, decoupled; times the learning rate
    seed: int = 0  # of the stochastic rounding of bf16 masters
    wire: torch.dtype = torch.float32  # of dA and dB on the way
    in_flight: int = 2
    offloaded: bool = False  # W's rows lie on the host, and come to the device one weight at a time


class Fold:
    """W <- (1 - lr * weight_decay) W + c * sum_i [dB_i A_i + (B_i + dB_i) dA_i], then dA_i = dB_i = 0.

    `prepare` once, when the fixed factors A, B are there, and `send_factors` when they have changed; then call it after
    a step of the optimizer, when `refuse_non_finite` has found nothing. Extra memory: the cached fixed factors, and
    what `Route.memory` says of `in_flight` buckets.
    """

    def __init__(self, registry: AdapterRegistry, dims: ParallelDims, plan: UpdatePlan, settings: FoldSettings):
        self.registry, self.dims, self.plan, self.settings = registry, dims, plan, settings
        self._device = registry.deltas.device
        coefficient = 1.0 / registry.method.shares if settings.aggregate == "mean" else 1.0
        self.exchanges = {
            name: route.exchange(registry.mesh, dims, coefficient, settings.wire) for name, route in ROUTES.items()
        }
        self._outgoing = OUTGOING[settings.wire](registry)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compare plans over all ranks, then `send_factors`.

        Raises:
            UserError: on every rank, if ranks disagree on the plan.
        """
        check_same_plan(self.plan)
        self.send_factors()

    @torch.no_grad()
    def send_factors(self) -> None:
        """Send the fixed factors that are to be cached, whenever they have new values. Collective."""
        cached = (bucket for bucket in self.plan.buckets if bucket.cached)
        tasks = (self.exchanges[b.route].prepare(list(b.shapes), self._outgoing.views(b.shapes)) for b in cached)
        run_tasks(tasks, self.settings.in_flight)

    @torch.no_grad()
    def __call__(self, lr: float, step: int) -> None:
        """Update every adapted weight in place. lr, the sum of the learning rates since the last fold, scales the
        weight decay; step keys the stochastic rounding. The host waits for the device nowhere.

        Where dA and dB travel as int8, their scales come first, all at once. Then:

        Phase 1, bucket by bucket, in the plan's order on all ranks: the bucket's updates start to travel. On the
        factors route, dA and rows of dB pass between the workers that hold adapters; on the dense route, the workers'
        parts of the update are summed onto the shards, piece by piece, and over the replicas. The collectives are
        asynchronous: the task yields, and waits for them when its turn comes.

        Phase 2, no collectives: the bucket has arrived. This worker multiplies it out, adds it to the rows of W that it
        owns.

        Phase 2 of a bucket runs while the next ones are in phase 1; at most `in_flight` buckets are in either. At the
        end every worker sets its own dA and dB to zero; what others received of them was a copy. No barrier ends the
        step: who needs the others' rows is the all-gather of the next forward pass.
        """
        decay = lr * self.settings.weight_decay
        self._outgoing.begin()
        run_tasks((self._fold_bucket(bucket, decay, step) for bucket in self.plan.buckets), self.settings.in_flight)
        self._outgoing.end()

    def _fold_bucket(self, bucket: Bucket, decay: float, step: int) -> Task:
        names = list(bucket.shapes)
        updates = yield from self.exchanges[bucket.route].travel(names, self._outgoing.take(names))  # phase 1
        with named("fold"):
            for name, update in zip(names, updates):  # phase 2
                held = self.registry.entries[name].weight_rows()
                if not held.numel():  # the last shards may be empty
                    continue
                rows = held if not self.settings.offloaded else held.to(self._device, non_blocking=True, copy=True)
                update.add_to(rows, decay, None if rows.dtype == torch.float32 else self._rounding(name, step))
                if self.settings.offloaded:
                    held.copy_(rows, non_blocking=True)

    def _rounding(self, name: str, step: int) -> Rounding:
        entry = self.registry.entries[name]
        block = owned_block(entry.shape, entry.split, self.dims.place(self.dims.rank), self.dims)
        return Rounding(rounding_key(self.settings.seed, step, name), block.row, block.column)


def check_same_plan(plan: UpdatePlan) -> None:
    """UserError on every rank if the ranks' plans differ: they would wait for different collectives.

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


def refuse_non_finite(registry: AdapterRegistry, step: int, gradient: float, update: float) -> None:
    """Stop a step whose update must not be folded.

    gradient, update: two numbers that are finite exactly where all gradients, and all dA and dB after the optimizer's
    step, are: a norm over all ranks, or a sum of squares. step: 0-based.

    Raises:
        FloatingPointError: one is not finite; on every rank, for the numbers are the same.
    """
    for what, value in (("gradient", gradient), ("update", update)):
        if not math.isfinite(value):
            name = first_not_finite(registry, what)
            raise FloatingPointError(
                f"step {step + 1}: the {what} of {name} is not finite; W is as it was before the step"
            )


@torch.no_grad()
def first_not_finite(registry: AdapterRegistry, what: str) -> str:
    """The first weight whose adapters' "gradient" or "update" is not finite on any rank. Collective."""
    flat = registry.gradients if what == "gradient" else registry.deltas
    bad = [
        not all(bool(piece.of(flat).isfinite().all()) for piece in entry.pieces.values())
        for entry in registry.entries.values()
    ]
    first = torch.tensor(bad.index(True) if True in bad else len(bad), device=flat.device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return list(registry.entries)[int(first)]
