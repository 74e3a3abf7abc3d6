"""What a step costs on 8 to 4,096 GPUs, on paper: compute, all-gathers of the weights, exchange of the updates.

    python tools/scaling.py --model llama3 --flavor 8B
    python tools/scaling.py --flavor 70B --adapters 8 --gpus 64,512,4096 --network 25 --utilisation 0.5
    python tools/scaling.py --gpus 8 --tokens 1024 --length 512 --micro-batches 8 --records 395000   # hours of an epoch

Weak scaling: every GPU computes `--tokens` per micro-batch and `--micro-batches` per optimizer step. Bytes of the
exchange are those of the update's routes (`distributed/update`), gathers those of the FSDP2 groups; both equal what
the collectives count (tests/distributed/test_scaling.py). Seconds are bytes over an assumed bandwidth: see
docs/scaling.md for the assumptions.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from titan_hd.adapters.hdpissa import HDPissaLinear, LocalHDPissaLinear
from titan_hd.components.flops import flops_per_token
from titan_hd.components.memory import Group, fold_bytes, fsdp_group_sizes, travelling_gradients
from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.distributed.update.gradients import bound_elements, gradient_traffic
from titan_hd.distributed.update.plan import UpdatePlan, plan_update
from titan_hd.distributed.update.route import Collective
from titan_hd.distributed.update.routes import ROUTES
from titan_hd.distributed.update.topology import WIRE_BYTES, Topology
from titan_hd.errors import UserError
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.registry import build_model, flavor_config


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
    memory: float = 75e9  # usable

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
    wire_bytes: of an element of an update on its way; local_steps: from one fold to the next."""

    config: ModelConfig
    rank: int = 16
    tokens: int = 8192
    length: int = 8192
    micro_batches: int = 1
    records: int = 0
    wire_bytes: int = 4
    local_steps: int = 1

    def epoch_hours(self, gpus: int, step: float) -> float:
        """Of an epoch's records, with steps of so many seconds."""
        return self.records / (gpus * self.micro_batches * self.tokens / self.length) * step / 3600

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Every linear layer of the blocks under its full name."""
        shapes = self.config.linear_shapes()
        return {name: shapes[kind] for name, kind in self.config.linear_layers().items()}

    @property
    def largest_k(self) -> int:
        """Most adapters with K * r directions in every weight."""
        return min(min(shape) for shape in self.shapes().values()) // self.rank


@dataclass(frozen=True)
class Estimate:
    """One row: seconds per step, GB received per GPU and step, bytes held per GPU. Of several steps for one fold the
    averages."""

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

    @property
    def step(self) -> float:
        """Gathers run beside the compute, the exchange after it."""
        return max(self.compute, self.gathers) + self.exchange

    @property
    def efficiency(self) -> float:
        return self.compute / self.step


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def fsdp_gathers(config: ModelConfig, shards: int, element: int, trained: bool = False, passes: int = 2) -> list[int]:
    """Bytes that a GPU receives in each all-gather of the weights of one micro-batch (a forward and a backward pass).

    element: bytes of an element as gathered. trained: method full, whose backward pass wants the embedding again.
    passes: 1 where the weights stay gathered, and these are the gathers of a whole step.
    """
    sizes = [(group.shard, min(passes, group.gathers(trained))) for group in _groups(config, shards)]
    return [(shards - 1) * shard * element for shard, times in sizes for _ in range(times)]


def _groups(config: ModelConfig, shards: int) -> list[Group]:
    with torch.device("meta"):
        return list(fsdp_group_sizes(build_model(config), shards))


def gradient_collectives(work: Work, topology: Topology) -> list[Collective]:
    """What brings the adapters' gradients to their holders."""
    return gradient_traffic([*work.shapes().values()], topology)


def adapter_elements(work: Work, topology: Topology) -> int:
    """Elements of dA and dB of the hosted adapters."""
    return topology.hosted * work.rank * sum(sum(shape) for shape in work.shapes().values())


def state_bytes(work: Work, plan: UpdatePlan) -> dict[str, int]:
    """What the first worker holds all the time: fp32 shards of W; A, B, dA, dB, their gradients and Adam's moments; the
    cached static factors; where all adapters learn from all samples, their factors in bf16 and their gradients."""
    topology, together = plan.topology, 0
    if topology.samples == "all":
        together = bound_elements([*work.shapes().values()], topology)
    return {
        "shards": 4 * sum(group.shard for group in _groups(work.config, topology.dp_shard)),
        "adapters": 5 * 4 * adapter_elements(work, topology),
        "cache": sum(w.cache_bytes for w in plan.weights if w.cached),
        "together": (2 + 4) * together,
    }


def passing_bytes(work: Work, plan: UpdatePlan) -> int:
    """The most that comes and goes: activations (each block recomputed) beside gathered weights and the logits or, in
    the backward pass, gradients on their way to the adapters' holders; or the fold's buckets."""
    c, t, bf16 = work.config, work.tokens, 2
    widths = sum(out for out, _ in c.linear_shapes().values()) + 4 * c.hidden_size
    activations = t * bf16 * (c.num_hidden_layers * c.hidden_size + 2 * widths)
    logits = t * c.vocab_size * (bf16 + 3 * 4)  # bf16; fp32, their softmax and its gradient
    numels = [plan.topology.dp_shard * group.shard for group in _groups(c, plan.topology.dp_shard)]
    gathered = bf16 * (sum(sorted(numels)[-2:]) + max(numels))
    gradients = travelling_gradients(plan, in_flight=2, device_type="cuda")
    return max(activations + max(logits, gradients) + gathered, fold_bytes(plan, in_flight=2))


# ---------------------------------------------------------------------------------------------------------------------
# Seconds


def compute_seconds(work: Work, cluster: Cluster, dense_gradient: bool = False, together: int = 1) -> float:
    """4N + attention, every block computed again in the backward pass; with a dense gradient 6N. together: adapters
    that learn from a sample."""
    c = work.config
    weights = sum(out * width for out, width in work.shapes().values())
    products = LocalHDPissaLinear.skinny if work.local_steps > 1 else HDPissaLinear.skinny
    adapters = products * together * sum(work.rank * sum(shape) for shape in work.shapes().values())
    flops = flops_per_token(c, work.length, weights if dense_gradient else 0, adapters)
    again = 2 * weights + c.mixing_flops(work.length)
    return work.micro_batches * work.tokens * (flops + again) / (cluster.peak * cluster.utilisation)


def gather_seconds(work: Work, topology: Topology, cluster: Cluster) -> tuple[float, float]:
    """Seconds and bytes of a step's all-gathers in bf16."""
    shards = topology.dp_shard
    gathers = fsdp_gathers(work.config, shards, 2)
    seconds = sum(cluster.ring(received, shards, min(shards, cluster.node)) for received in gathers)
    return work.micro_batches * seconds, work.micro_batches * sum(gathers)


def exchange_seconds(work: Work, plan: UpdatePlan, cluster: Cluster) -> tuple[float, float]:
    """Seconds and bytes of the fold, on average over the steps from one to the next, and of the gradients on their way
    to the adapters' holders.

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
    return fold / t.local_steps + sum(map(cluster.seconds, gradients)), plan.received_per_step


def estimate(work: Work, topology: Topology, exchange: str, cluster: Cluster) -> Estimate:
    """A step of titan_hd on one mesh."""
    plan = plan_update(work.shapes(), topology, exchange)
    gathers, gathered = gather_seconds(work, topology, cluster)
    seconds, exchanged = exchange_seconds(work, plan, cluster)
    mesh = f"{topology.dp_replicate} x {topology.dp_shard}"
    memory = sum(state_bytes(work, plan).values()) + passing_bytes(work, plan)
    compute = compute_seconds(work, cluster, together=topology.num_adapters if topology.samples == "all" else 1)
    k, gpus = topology.num_adapters, topology.workers
    return Estimate(gpus, k, mesh, exchange, compute, gathers, seconds, gathered, exchanged, memory)


def authors_estimate(work: Work, gpus: int, cluster: Cluster) -> Estimate:
    """The published script's scheme, K = GPUs, were it to run on several nodes: W whole and in fp32 everywhere, dense
    gradients, A, B, dA, dB of everybody to everybody, and everybody forms the whole sum."""
    shapes = work.shapes().values()
    per_adapter = 2 * 4 * work.rank * sum(sum(shape) for shape in shapes)
    received = (gpus - 1) * per_adapter
    products = 4 * gpus * work.rank * sum(out * width for out, width in shapes) / cluster.fold_rate
    wire = cluster.ring(received, gpus, min(gpus, cluster.node))
    whole = sum(group.shard for group in _groups(work.config, 1))
    plan = plan_update(work.shapes(), Topology(1, work.rank, 1, 1))
    memory = 4 * whole + 5 * per_adapter // 2 + passing_bytes(work, plan)
    compute = compute_seconds(dataclasses.replace(work, local_steps=1), cluster, dense_gradient=True)
    return Estimate(gpus, gpus, "whole W", "authors", compute, 0.0, wire + products, 0.0, received, memory)


def best(work: Work, gpus: int, num_adapters: int, exchange: str, cluster: Cluster, samples: str = "own") -> Estimate:
    """The mesh of whole nodes that fits into memory and is fastest; of those within 1% of it, the one that gathers
    least. Where none fits, the smallest one in memory."""
    shards = [s for s in range(min(gpus, cluster.node), gpus + 1) if gpus % s == 0 and s % min(gpus, cluster.node) == 0]
    topologies = [
        Topology(num_adapters, work.rank, gpus // s, s, work.wire_bytes, samples, work.local_steps)
        for s in shards
        if (s & (s - 1)) == 0
    ]
    rows = [estimate(work, topology, exchange, cluster) for topology in topologies]
    fitting = [row for row in rows if row.memory <= cluster.memory]
    if not fitting:
        return min(rows, key=lambda row: row.memory)
    fastest = min(row.step for row in fitting)
    return min((row for row in fitting if row.step <= 1.01 * fastest), key=lambda row: row.gathers)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(work: Work, gpu_counts: list[int], num_adapters: list[int], cluster: Cluster, samples: str = "own") -> str:
    """Rows for every number of GPUs: K of the list on both routes, K = GPUs, and the authors' scheme."""
    lines = [
        f"{'GPUs':>5} {'K':>5}  {'mesh':<10}{'route':<8} {'compute':>8} {'gathers':>8} {'exchange':>8} {'step s':>8}"
        f" {'of ideal':>8} {'GB gathered':>11} {'exchanged':>9} {'GB held':>8}{'    hours' if work.records else ''}"
    ]
    for gpus in gpu_counts:
        most = max(k for k in range(1, min(gpus, work.largest_k) + 1) if gpus % k == 0)
        ks = sorted({k for k in [*num_adapters, most] if k <= work.largest_k})
        rows = [best(work, gpus, k, route, cluster, samples) for k in ks for route in ROUTES]
        lines += [_line(row, work, cluster.memory) for row in rows]
        if gpus <= work.largest_k:
            lines.append(_line(authors_estimate(work, gpus, cluster), work, cluster.memory))
        else:
            lines.append(
                f"{gpus:>5} {gpus:>5}  {'whole W':<10}{'authors':<8} impossible: K * r = {gpus * work.rank} singular "
                f"directions, the smallest weight has {work.largest_k * work.rank}"
            )
    return "\n".join(lines)


def _line(row: Estimate, work: Work, memory: float) -> str:
    head = f"{row.gpus:>5} {row.num_adapters:>5}  {row.mesh:<10}{row.route:<8}"
    seconds = "".join(f" {s:>8.3f}" for s in (row.compute, row.gathers, row.exchange, row.step))
    sizes = f" {row.efficiency:>8.1%} {row.gathered / 1e9:>11.2f} {row.exchanged / 1e9:>9.3f} {row.memory / 1e9:>8.1f}"
    sizes += f" {work.epoch_hours(row.gpus, row.step):>8.1f}" if work.records else ""
    return head + seconds + sizes + ("  does not fit" if row.memory > memory else "")


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--model", default="llama3", help="family, as model.name")
    parser.add_argument("--flavor", default="8B", help="size, as model.flavor")
    parser.add_argument("--gpus", default="8,64,512,4096", help="numbers of GPUs (powers of two)")
    parser.add_argument("--adapters", default="8", help="values of K, beside K = GPUs as far as the rank allows")
    parser.add_argument("--rank", type=int, default=16, help="r of an adapter")
    parser.add_argument("--samples", choices=["own", "all"], default="own", help="as hdpissa.samples")
    parser.add_argument("--tokens", type=int, default=8192, help="per GPU and micro-batch")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a GPU in an optimizer step")
    parser.add_argument("--records", type=int, default=0, help="of an epoch, each of --length tokens: adds its hours")
    parser.add_argument(
        "--exchange-dtype", default="float32", choices=list(WIRE_BYTES), help="as hdpissa.exchange_dtype"
    )
    parser.add_argument("--local-steps", type=int, default=1, help="as hdpissa.local_steps; figures are means per step")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s per GPU inside a node")
    parser.add_argument("--network", type=float, default=50, help="GB/s per GPU between nodes")
    parser.add_argument("--peak", type=float, default=989, help="TFLOP/s of a GPU in bf16")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that compute reaches")
    parser.add_argument("--memory", type=float, default=75, help="usable GB of a GPU")
    args = parser.parse_args()
    try:
        config, sizes = flavor_config(args.model, args.flavor), (args.tokens, args.length, args.micro_batches)
        work = Work(config, args.rank, *sizes, args.records, WIRE_BYTES[args.exchange_dtype], args.local_steps)
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    cluster = Cluster(
        nvlink=args.nvlink * 1e9,
        network=args.network * 1e9,
        peak=args.peak * 1e12,
        utilisation=args.utilisation,
        memory=args.memory * 1e9,
    )
    if args.local_steps < 1 or (args.local_steps > 1 and args.samples == "all"):
        manager.exit_with(["--local-steps: a number of steps, at least 1, and above that with --samples own alone"])
    gpus, adapters = ([int(part) for part in text.split(",")] for text in (args.gpus, args.adapters))
    odd = [(k, n) for n in gpus for k in adapters if max(k, n) % min(k, n)]
    if odd:
        k, n = odd[0]
        manager.exit_with([f"--adapters: {k} adapters cannot be dealt to {n} GPUs; one number must divide the other"])
    print(f"{args.model} {args.flavor}, r = {args.rank}, {args.micro_batches} x {args.tokens} tokens per GPU and step")
    print(table(work, gpus, adapters, cluster, args.samples))


if __name__ == "__main__":
    main()
