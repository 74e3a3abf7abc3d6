"""How each weight's update will travel: decided once, from shapes, meshes and dtypes alone.

Bytes are what the worker with the largest shard receives per fold; `factors.py` and `dense.py` have the formulas. No
torch in here, nor in what a route counts by: the plan of a 405B model on 4,096 GPUs is computed on a laptop.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from titan_hd.distributed.update.gradients import bound_elements, gradient_traffic
from titan_hd.distributed.update.route import Shape
from titan_hd.distributed.update.routes import ROUTES
from titan_hd.distributed.update.topology import Topology

GIB = 2**30
_DEFAULT_CACHE_BYTES = 2 * GIB


@dataclass(frozen=True)
class WeightPlan:
    """One adapted weight and its route. Byte counts are per worker.

    cached: the route's fixed factors stay on the workers. cache_bytes: what that takes; 0 if none travel.
    received_by_route: bytes per fold on each of `ROUTES`, by name.
    """

    name: str
    shape: Shape
    route: str
    cached: bool
    cache_bytes: int
    received_by_route: dict[str, int]

    @property
    def received(self) -> int:
        """Bytes per fold on the chosen route."""
        return self.received_by_route[self.route]


@dataclass(frozen=True)
class Bucket:
    """Weights that travel together on one route; the fixed factors of all or of none of them are cached."""

    route: str
    cached: bool
    shapes: dict[str, Shape]


@dataclass(frozen=True)
class UpdatePlan:
    """Plans of all weights in the model's order, and the buckets in the order in which they travel."""

    topology: Topology
    weights: tuple[WeightPlan, ...]
    buckets: tuple[Bucket, ...]

    def digest(self) -> str:
        """Equal on all ranks, or the run must not start."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def received_gradients(self) -> int:
        """Bytes per step of the adapters' gradients, on their way to the holders and among workers that share one."""
        traffic = gradient_traffic([w.shape for w in self.weights], self.topology)
        return sum(collective.received for collective in traffic)

    @property
    def received_per_step(self) -> float:
        """Bytes of updates, on average over the steps from one fold to the next, and of gradients."""
        return sum(w.received for w in self.weights) / self.topology.local_steps + self.received_gradients

    def summary(self) -> str:
        """How much travels, and how, on one line; `table` has the kinds of weights."""
        if self.topology.workers == 1:
            return "nothing travels: there is one worker"
        gradients, each = self.received_gradients, self.received_per_step
        counts = Counter(w.route for w in self.weights)
        routes = " and ".join(f"{route} for {count}" for route, count in counts.items())
        dense = sum(w.received_by_route["dense"] for w in self.weights) / self.topology.local_steps + gradients
        more = f"; all dense would be {dense / each:.1f} times that" if dense > each else ""
        part = f", {gradients / 1e9:.3f} GB of it the adapters' gradients" if gradients else ""
        return f"{each / 1e9:.3f} GB received per worker and step{part}, {routes} of {len(self.weights)} weights{more}"

    def table(self) -> str:
        """One line per kind of weight (equal shape and route), and the totals."""
        kinds: dict[tuple, list[WeightPlan]] = {}
        for w in self.weights:
            kinds.setdefault((w.name.rpartition(".")[2], w.shape, w.route, w.cached), []).append(w)
        t = self.topology
        once = "step" if t.local_steps == 1 else "fold"
        lines = [
            f"update of {len(self.weights)} weights, K = {t.num_adapters}, r = {t.rank}, "
            f"{t.dp_replicate} x {t.dp_shard} workers, {_wire(t)}; received per worker and {once}:",
            f"  {'layer':<12}{'[out, in]':<18}{'count':>5}  {'route':<9}{'static':<10}"
            + "".join(f"{name + ' MB':>12}" for name in ROUTES),
        ]
        for (layer, shape, route, cached), group in kinds.items():
            w = group[0]
            static = ("cached" if cached else "gathered") if w.cache_bytes else "-"
            lines.append(
                f"  {layer:<12}{list(shape)!s:<18}{len(group):>5}  {route:<9}{static:<10}"
                + "".join(f"{received / 1e6:>12.3f}" for received in w.received_by_route.values())
            )
        total = sum(w.received for w in self.weights)
        dense = sum(w.received_by_route["dense"] for w in self.weights)
        cache = sum(w.cache_bytes for w in self.weights if w.cached)
        ratio = f"; all dense would be {dense / total:.1f} times that" if total else ""
        lines.append(f"  total {total / 1e9:.3f} GB{ratio}; static factors cached: {cache / 1e9:.3f} GB")
        shapes = [w.shape for w in self.weights]
        if t.local_steps > 1:
            lines.append(
                f"  a fold every {t.local_steps} steps: {total / t.local_steps / 1e9:.3f} GB per step on average"
            )
        gradients = self.received_gradients
        if t.samples == "all":
            lines.append(
                f"  adapters learn from all samples: each worker has the fp32 gradients of {t.directions} directions, "
                f"{4 * bound_elements(shapes, t) / 1e9:.3f} GB; their holders receive {gradients / 1e9:.3f} GB more"
            )
        elif gradients:
            lines.append(
                f"  {t.sharing} workers share an adapter and add up its gradients: {gradients / 1e9:.3f} GB more in "
                "every step"
            )
        if gradients:
            lines.append(f"  updates and gradients: {self.received_per_step / 1e9:.3f} GB per step")
        return "\n".join(lines)


def plan_update(
    shapes: Mapping[str, Shape], topology: Topology, exchange: str = "auto", cache_gb: float | None = None
) -> UpdatePlan:
    """Choose a route for every weight.

    shapes: full layer name -> (out, in) of W (the tp-local shape under tensor parallelism), in the model's order.
    exchange: the name of a route, or "auto" for the cheapest one in bytes, weight by weight.
    cache_gb: memory per worker for fixed factors; None: 2 GiB, or as much as the worker's fp32 shards if that is more.
    """
    if cache_gb is None:
        shards = sum(4 * topology.chunk(out) * width for out, width in shapes.values())
        budget = max(_DEFAULT_CACHE_BYTES, shards)
    else:
        budget = int(cache_gb * GIB)
    weights = []
    for name, shape in shapes.items():
        plan = _plan_weight(name, shape, topology, exchange, budget)
        if plan.cached:
            budget -= plan.cache_bytes
        weights.append(plan)
    return UpdatePlan(topology, tuple(weights), _buckets(weights))


def _plan_weight(name: str, shape: Shape, t: Topology, exchange: str, budget: int) -> WeightPlan:
    cache = {key: route.cache_bytes(shape, t) for key, route in ROUTES.items()}
    received = {
        key: sum(collective.received for collective in route.traffic([shape], t, cached=cache[key] <= budget))
        for key, route in ROUTES.items()
    }
    chosen = min(received, key=received.__getitem__) if exchange == "auto" else exchange
    return WeightPlan(name, shape, chosen, 0 < cache[chosen] <= budget, cache[chosen], received)


def block_of(name: str) -> str | None:
    """The transformer block of a layer, both under their full names; None for one that is in no block."""
    block = re.match(r"(.*?\.\d+)\.", name)
    return block[1] if block else None


def _wire(t: Topology) -> str:
    if not t.scale_bytes:
        return f"{t.wire_bytes} bytes per element"
    return f"{t.wire_bytes} byte per element and {t.scale_bytes} per row (dense: {t.sum_bytes} per element)"


def _buckets(weights: list[WeightPlan]) -> tuple[Bucket, ...]:
    """Weights of a transformer block travel together, but for those whose route fills a bucket with each of them."""
    together: dict[tuple[str, str, bool], dict[str, Shape]] = {}
    for w in weights:
        block = None if ROUTES[w.route].fills_bucket else block_of(w.name)
        key = (block or w.name, w.route, w.cached)
        together.setdefault(key, {})[w.name] = w.shape
    return tuple(Bucket(route, cached, shapes) for (_, route, cached), shapes in together.items())
