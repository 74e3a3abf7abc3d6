"""What a step of HD-PiSSA costs on a cluster, from shapes alone: bytes exactly, seconds from assumed rates, memory as a
run estimates it. The library of tools/scaling.py; docs/scaling.md has the assumptions.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

import torch

from titan_hd.adapters.hdpissa import HDPissaLinear, LocalHDPissaLinear
from titan_hd.components.flops import flops_per_token
from titan_hd.components.memory import Estimate as Memory
from titan_hd.components.memory import Group, Sizes, estimate_memory, fsdp_group_sizes
from titan_hd.config import job_config
from titan_hd.distributed.update.gradients import bound_elements, gradient_traffic
from titan_hd.distributed.update.plan import UpdatePlan, plan_update
from titan_hd.distributed.update.route import Collective, Shape
from titan_hd.distributed.update.routes import ROUTES
from titan_hd.distributed.update.topology import Topology
from titan_hd.fitting import usable_bytes
from titan_hd.models.model import Model
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.registry import build_model

Checkpointing = Literal["none", "selective", "full"]
Masters = Literal["float32", "bfloat16"]

# Seconds of the host for one layer: forward and backward pass of a micro-batch, not compiled, by the mode of activation
# checkpointing (`benchmarks.bench_checkpointing`), and an optimizer step beside the fold's products, in which the GPU
# waits for the host (`benchmarks.bench_host`).
HOST_LAYER = {"none": 60.0e-3 / 32, "selective": 68.1e-3 / 32, "full": 100.1e-3 / 32}
HOST_STEP = 5.6e-3 / 32


@dataclass(frozen=True)
class Cluster:
    """Rates in units of 1 per second: bytes, FLOPs. Defaults are assumptions for nodes of eight H100."""

    node: int = 8
    nvlink: float = 450e9  # received per GPU inside a node (NVLink 4, one direction)
    network: float = 50e9  # received per GPU between nodes (one 400 Gb/s link each)
    nvlink_latency: float = 1e-6  # of one hop of a ring
    network_latency: float = 5e-6
    peak: float = 989e12  # bf16, dense
    utilisation: float = 0.4
    fold_rate: float = 50e12  # of the fp32 products of the fold
    memory: float = usable_bytes(80)
    host: float = 1.0  # seconds of a host for one of the host that HOST_LAYER and HOST_STEP were measured on

    def ring(self, received: float, size: int, per_node: int) -> float:
        """Seconds of an all-gather or reduce-scatter among `size` GPUs, `per_node` of them on each node.

        A ring enters a node by every member's own network link, so all of these links together bring a node its data.
        """
        if size == 1:
            return 0.0
        nodes = -(-size // per_node)
        rate = self.nvlink if nodes == 1 else min(self.nvlink, per_node * self.network)
        return received / rate + (nodes - 1) * self.network_latency + (size - nodes) * self.nvlink_latency

    def all_to_all(self, received: float, size: int, per_node: int) -> float:
        """Seconds of an all-to-all: what comes from other nodes passes the GPU's own network link."""
        if size == 1:
            return 0.0
        nodes = -(-size // per_node)
        outside = received * (size - min(size, per_node)) / (size - 1)
        seconds = max(outside / self.network, (received - outside) / self.nvlink)
        return seconds + (nodes - 1) * self.network_latency + (size - nodes) * self.nvlink_latency

    def seconds(self, collective: Collective) -> float:
        _, received, size, apart = collective
        per_node = max(1, min(size, self.node // apart))
        if collective.kind == "all_to_all":
            return self.all_to_all(received, size, per_node)
        if collective.kind == "all_reduce":  # a reduce-scatter and an all-gather
            return 2 * self.ring(received / 2, size, per_node)
        return self.ring(received, size, per_node)


@dataclass(frozen=True)
class Work:
    """The model, and a step of a GPU: tokens per micro-batch, in sequences of `length`. records: of an epoch.
    wire_bytes: of an element of an update on its way; local_steps: from one fold to the next; checkpointing: the mode;
    masters: their dtype; refresh_steps: from one taking of slices to the next, 0: never."""

    config: ModelConfig
    rank: int = 16
    tokens: int = 8192
    length: int = 8192
    micro_batches: int = 1
    records: int = 0
    wire_bytes: int = 4
    local_steps: int = 1
    checkpointing: Checkpointing = "full"
    masters: Masters = "float32"
    refresh_steps: int = 0

    def epoch_hours(self, gpus: int, step: float) -> float:
        """Of an epoch's records, with steps of so many seconds."""
        return self.records / (gpus * self.micro_batches * self.tokens / self.length) * step / 3600

    def shapes(self) -> dict[str, Shape]:
        """Every linear layer of the blocks under its full name."""
        shapes = self.config.linear_shapes()
        return {name: shapes[kind] for name, kind in self.config.linear_layers().items()}

    @property
    def largest_k(self) -> int:
        """Most adapters with K * r directions in every weight."""
        return min(min(shape) for shape in self.shapes().values()) // self.rank


@dataclass(frozen=True)
class Estimate:
    """One row: seconds per step, bytes received per GPU and step, bytes of its memory. Of several steps for one fold
    the averages.

    gathers, host, beside run while the GPU computes: the all-gathers of the weights, the host's launches, and gradients
    of the adapters, block by block. exchange comes after it: the fold, and gradients that are summed at the end. In gap
    the GPU waits for the host. gradients: what of exchanged the adapters' gradients are; refreshed: bytes of taking
    all slices anew, once.
    """

    gpus: int
    num_adapters: int
    mesh: str
    route: str
    compute: float
    gathers: float
    exchange: float
    gathered: float
    exchanged: float
    memory: float
    beside: float = 0.0
    host: float = 0.0
    gap: float = 0.0
    gradients: int = 0
    refreshed: float = 0.0

    @property
    def step(self) -> float:
        return max(self.compute, self.gathers + self.beside, self.host) + self.exchange + self.gap

    @property
    def efficiency(self) -> float:
        return self.compute / self.step

    @property
    def bound(self) -> str:
        """What a step spends most of its time on, or waits for."""
        parts = {
            "compute": self.compute,
            "gathers": self.gathers + self.beside,
            "host": self.host,
            "exchange": self.exchange,
        }
        return max(parts, key=lambda name: parts[name])


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def fsdp_gathers(config: ModelConfig, shards: int, element: int, trained: bool = False, passes: int = 2) -> list[int]:
    """Bytes that a GPU receives in each all-gather of the weights of one micro-batch (a forward and a backward pass).

    element: bytes of an element as gathered. trained: method full, whose backward pass wants the embedding again.
    passes: 1 where the weights stay gathered, and these are the gathers of a whole step.
    """
    sizes = [(group.shard, min(passes, group.gathers(trained))) for group in _groups(config, shards)]
    return [(shards - 1) * shard * element for shard, times in sizes for _ in range(times)]


_MODELS: dict[str, Model] = {}
_GROUPS: dict[tuple[str, int], list[Group]] = {}


def _groups(config: ModelConfig, shards: int) -> list[Group]:
    model, key = repr(config), (repr(config), shards)
    if model not in _MODELS:
        with torch.device("meta"):
            _MODELS[model] = build_model(config)
    if key not in _GROUPS:
        _GROUPS[key] = list(fsdp_group_sizes(_MODELS[model], shards))
    return _GROUPS[key]


def plan_of(work: Work, topology: Topology, exchange: str) -> UpdatePlan:
    """How the updates travel: the same for every micro-batch and checkpointing, of which many are tried."""
    return _plan(tuple(work.shapes().items()), topology, exchange)


@functools.lru_cache(maxsize=64)
def _plan(shapes: tuple[tuple[str, Shape], ...], topology: Topology, exchange: str) -> UpdatePlan:
    return plan_update(dict(shapes), topology, exchange)


def gradient_collectives(work: Work, topology: Topology) -> list[Collective]:
    """What brings the adapters' gradients to their holders."""
    return gradient_traffic([*work.shapes().values()], topology)


def refresh_bytes(work: Work, plan: UpdatePlan, compute_bytes: int = 2) -> float:
    """What a GPU receives, on average, when all slices are taken anew: the weights that it decomposes, whole, in the
    masters' dtype; the slices of the adapters that it hosts, in fp32; and what is kept of all adapters' factors.

    compute_bytes: of an element in a micro-batch's products.
    """
    t, shapes = plan.topology, [*work.shapes().values()]
    element = getattr(torch, work.masters).itemsize
    whole = sum(element * out * width * (t.dp_shard - 1) / t.dp_shard for out, width in shapes)
    hosted = t.hosted * t.rank * sum(map(sum, shapes))
    received = (whole + 4 * hosted * (t.workers - 1)) / t.workers
    for bucket in plan.buckets:
        if bucket.cached:
            route, of = ROUTES[bucket.route], [*bucket.shapes.values()]
            again, kept = (sum(c.received for c in route.traffic(of, t, cached)) for cached in (False, True))
            received += again - kept
    if t.samples == "all":  # a micro-batch computes with all of them
        received += compute_bytes * (bound_elements(shapes, t) - hosted)
    return received


def memory_of(work: Work, plan: UpdatePlan) -> Memory:
    """What a GPU of a run needs: that run's own estimate, with a frozen base in bf16 files and bf16 compute."""
    t, length = plan.topology, min(work.length, work.tokens)
    config = job_config.JobConfig(
        training=job_config.Training(
            seq_len=length,
            local_batch_size=work.tokens // length,
            mixed_precision_param="bfloat16",
            master_dtype=work.masters,
        ),
        adapter=job_config.Adapter(rank=work.rank),
        hdpissa=job_config.HDPissa(
            num_adapters=t.num_adapters,
            samples="all" if t.samples == "all" else "own",
            local_steps=t.local_steps,
            refresh_steps=work.refresh_steps,
        ),
        activation_checkpoint=job_config.ActivationCheckpoint(mode=work.checkpointing),
    )
    mesh = t.dp_replicate, t.dp_shard, 1
    return estimate_memory(Sizes(config, work.config, mesh, plan, "cuda", torch.bfloat16))


# ---------------------------------------------------------------------------------------------------------------------
# Seconds


def compute_seconds(work: Work, cluster: Cluster, dense_gradient: bool = False, together: int = 1) -> float:
    """4N + attention, with "full" checkpointing every block again in the backward pass; with a dense gradient 6N.
    together: adapters that learn from a sample."""
    c = work.config
    weights = sum(out * width for out, width in work.shapes().values())
    products = LocalHDPissaLinear.skinny if work.local_steps > 1 else HDPissaLinear.skinny
    adapters = products * together * sum(work.rank * sum(shape) for shape in work.shapes().values())
    flops = flops_per_token(c, work.length, weights if dense_gradient else 0, adapters)
    again = 2 * weights + c.mixing_flops(work.length)
    again *= work.checkpointing == "full"  # "selective" computes no product and no attention twice
    return work.micro_batches * work.tokens * (flops + again) / (cluster.peak * cluster.utilisation)


def gather_seconds(work: Work, topology: Topology, cluster: Cluster) -> tuple[float, float]:
    """Seconds and bytes of a step's all-gathers in bf16."""
    shards = topology.dp_shard
    gathers = fsdp_gathers(work.config, shards, 2)
    seconds = sum(cluster.ring(received, shards, min(shards, cluster.node)) for received in gathers)
    return work.micro_batches * seconds, work.micro_batches * sum(gathers)


def exchange_seconds(work: Work, plan: UpdatePlan, cluster: Cluster) -> tuple[float, float]:
    """Seconds of the fold, on average over the steps from one to the next, and of the gradients on their way to the
    adapters' holders.

    Holders stand as far apart as they can (workers / holders), so that they are on different nodes where K is at most
    the number of nodes. The products of one bucket run beside the collectives of the next.
    """
    t = plan.topology
    wire = products = 0.0
    for bucket in plan.buckets:
        route, shapes = ROUTES[bucket.route], [*bucket.shapes.values()]
        wire += sum(cluster.seconds(collective) for collective in route.traffic(shapes, t, bucket.cached))
        products += sum(route.flops(shape, t) for shape in shapes)
    gradients = gradient_collectives(work, t)
    fold = max(wire, products / cluster.fold_rate)
    return fold / t.local_steps, sum(map(cluster.seconds, gradients))


def host_seconds(work: Work, cluster: Cluster) -> tuple[float, float]:
    """Of launching a step's forward and backward passes, and of what the GPU waits for."""
    layers = work.config.num_hidden_layers
    launches = work.micro_batches * layers * HOST_LAYER[work.checkpointing]
    return cluster.host * launches, cluster.host * layers * HOST_STEP


def estimate(work: Work, topology: Topology, exchange: str, cluster: Cluster) -> Estimate:
    """A step of titan_hd on one mesh."""
    plan = plan_of(work, topology, exchange)
    gathers, gathered = gather_seconds(work, topology, cluster)
    fold, gradients = exchange_seconds(work, plan, cluster)
    together = topology.samples == "all"
    host, gap = host_seconds(work, cluster)
    return Estimate(
        gpus=topology.workers,
        num_adapters=topology.num_adapters,
        mesh=f"{topology.dp_replicate} x {topology.dp_shard}",
        route=exchange,
        compute=compute_seconds(work, cluster, together=topology.num_adapters if together else 1),
        gathers=gathers,
        beside=gradients if together else 0.0,  # block by block in the backward pass; else after the last one
        host=host,
        exchange=fold if together else fold + gradients,
        gap=gap,
        gathered=gathered,
        exchanged=plan.received_per_step,
        memory=memory_of(work, plan).total,
        gradients=plan.received_gradients,
        refreshed=refresh_bytes(work, plan),
    )


def authors_estimate(work: Work, gpus: int, cluster: Cluster) -> Estimate:
    """The published script's scheme, K = GPUs, were it to run on several nodes: W whole and in fp32 everywhere, dense
    gradients, A, B, dA, dB of everybody to everybody, and everybody forms the whole sum."""
    shapes = work.shapes().values()
    per_adapter = 2 * 4 * work.rank * sum(sum(shape) for shape in shapes)
    received = (gpus - 1) * per_adapter
    products = 4 * gpus * work.rank * sum(out * width for out, width in shapes) / cluster.fold_rate
    wire = cluster.ring(received, gpus, min(gpus, cluster.node))
    whole = sum(group.shard for group in _groups(work.config, 1))
    passing = memory_of(work, plan_of(work, Topology(1, work.rank, 1, 1), "factors"))
    host, gap = host_seconds(work, cluster)
    return Estimate(
        gpus=gpus,
        num_adapters=gpus,
        mesh="whole W",
        route="authors",
        compute=compute_seconds(dataclasses.replace(work, local_steps=1), cluster, dense_gradient=True),
        gathers=0.0,
        host=host,
        exchange=wire + products,
        gap=gap,
        gathered=0.0,
        exchanged=received,
        memory=4 * whole + 5 * per_adapter // 2 + sum(passing.passing.values()) + passing.beside,
    )


def best(work: Work, gpus: int, num_adapters: int, exchange: str, cluster: Cluster, samples: str = "own") -> Estimate:
    """The mesh of whole nodes that fits into memory and is fastest; of those within 1% of it, the one that gathers
    least. Where none fits, the smallest one in memory."""
    step = min(gpus, cluster.node)
    topologies = [
        Topology(num_adapters, work.rank, gpus // s, s, work.wire_bytes, samples, work.local_steps)
        for s in range(step, gpus + 1, step)
        if gpus % s == 0
    ]
    rows = [estimate(work, t, exchange, cluster) for t in topologies]
    fitting = [row for row in rows if row.memory <= cluster.memory]
    if not fitting:
        return min(rows, key=lambda row: row.memory)
    fastest = min(row.step for row in fitting)
    return min((row for row in fitting if row.step <= 1.01 * fastest), key=lambda row: row.gathers)
