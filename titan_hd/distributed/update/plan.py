"""How each weight's update will travel: decided once, from shapes, meshes and dtypes alone.

Bytes are what the worker with the largest shard receives per step. With n = min(K, W) holders that exchange with each
other, k = K / n adapters on each, and at most `chunk` = ceil(out / dp_shard) rows of W per worker:

    factors  (n - 1) k r (in + chunk), and the same again for the static factors unless they are cached
    dense    a reduce-scatter of [out, in] over dp_shard, then an all-reduce of the rows over dp_replicate

No torch in here: the plan of a 405B model on 4,096 GPUs is computed on a laptop.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
_DEFAULT_CACHE_BYTES = 2 * GIB


@dataclass(frozen=True)
class Topology:
    """K adapters of rank r on dp_replicate x dp_shard workers; wire_bytes is the size of an element that travels."""

    num_adapters: int
    rank: int
    dp_replicate: int
    dp_shard: int
    wire_bytes: int = 4

    @property
    def workers(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def holders(self) -> int:
        """Workers that exchange with each other; where K < W, W / K such sets run side by side."""
        return min(self.num_adapters, self.workers)

    @property
    def hosted(self) -> int:
        """Adapters on each holder."""
        return self.num_adapters // self.holders

    def chunk(self, out_features: int) -> int:
        """Rows of the largest shard."""
        return -(-out_features // self.dp_shard)


@dataclass(frozen=True)
class WeightPlan:
    """One adapted weight. Byte counts are per worker; `received` per step on the chosen route."""

    name: str
    shape: tuple[int, int]
    route: str
    cached: bool
    factors_bytes: int
    dense_bytes: int
    cache_bytes: int

    @property
    def received(self) -> int:
        return self.factors_bytes if self.route == "factors" else self.dense_bytes


@dataclass(frozen=True)
class UpdatePlan:
    """Plans of all weights in the model's order, and the buckets of names that travel together."""

    topology: Topology
    weights: tuple[WeightPlan, ...]
    buckets: tuple[tuple[str, ...], ...]

    def digest(self) -> str:
        """Equal on all ranks, or the run must not start."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def table(self) -> str:
        """One line per kind of weight (equal shape and route), and the totals."""
        kinds: dict[tuple, list[WeightPlan]] = {}
        for w in self.weights:
            kinds.setdefault((w.name.rpartition(".")[2], w.shape, w.route, w.cached), []).append(w)
        t = self.topology
        lines = [
            f"update of {len(self.weights)} weights, K = {t.num_adapters}, r = {t.rank}, "
            f"{t.dp_replicate} x {t.dp_shard} workers, {t.wire_bytes} bytes per element; received per worker and step:",
            f"  {'layer':<12}{'[out, in]':<18}{'count':>5}  {'route':<9}{'static':<10}"
            f"{'factors MB':>12}{'dense MB':>12}",
        ]
        for (layer, shape, route, cached), group in kinds.items():
            w = group[0]
            static = ("cached" if cached else "gathered") if route == "factors" else "-"
            lines.append(
                f"  {layer:<12}{list(shape)!s:<18}{len(group):>5}  {route:<9}{static:<10}"
                f"{w.factors_bytes / 1e6:>12.3f}{w.dense_bytes / 1e6:>12.3f}"
            )
        total, dense = sum(w.received for w in self.weights), sum(w.dense_bytes for w in self.weights)
        cache = sum(w.cache_bytes for w in self.weights if w.cached)
        ratio = f"; all dense would be {dense / total:.1f} times that" if total else ""
        lines.append(f"  total {total / 1e9:.3f} GB{ratio}; static factors cached: {cache / 1e9:.3f} GB")
        return "\n".join(lines)


def plan_update(
    shapes: Mapping[str, tuple[int, int]], topology: Topology, exchange: str = "auto", cache_gb: float | None = None
) -> UpdatePlan:
    """Choose a route for every weight.

    shapes: full layer name -> (out, in) of W (the tp-local shape under tensor parallelism), in the model's order.
    exchange: "factors", "dense", or "auto" for the cheaper one in bytes, weight by weight.
    cache_gb: memory per worker for static factors; None: 2 GiB, or as much as the worker's fp32 shards if that is more.
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


def _plan_weight(name: str, shape: tuple[int, int], t: Topology, exchange: str, budget: int) -> WeightPlan:
    out, width = shape
    once = (t.holders - 1) * t.hosted * t.rank * (width + t.chunk(out))
    cache = 4 * t.num_adapters * t.rank * (width + t.chunk(out))
    fits = cache <= budget
    factors = once * (t.wire_bytes if fits else t.wire_bytes + 4)  # static factors travel in fp32
    rows = t.chunk(out) * width * t.wire_bytes
    dense = (t.dp_shard - 1) * rows + 2 * (t.dp_replicate - 1) * rows // t.dp_replicate
    route = exchange if exchange != "auto" else ("dense" if dense < factors else "factors")
    return WeightPlan(name, shape, route, fits and route == "factors", factors, dense, cache)


def _buckets(weights: list[WeightPlan]) -> tuple[tuple[str, ...], ...]:
    """Factors of a transformer block travel together; a dense update fills a bucket by itself."""
    buckets: list[list[str]] = []
    open_bucket: dict[tuple, list[str]] = {}
    for w in weights:
        block = re.match(r"(.*layers\.\d+)\.", w.name)
        key = (block[1] if block else w.name, w.cached)
        if w.route == "dense":
            buckets.append([w.name])
        elif key in open_bucket:
            open_bucket[key].append(w.name)
        else:
            open_bucket[key] = [w.name]
            buckets.append(open_bucket[key])
    return tuple(tuple(b) for b in buckets)
