"""What a step costs on 1 to 4,096 GPUs, on paper: compute, all-gathers of the weights, exchange of the updates, the
host's time, memory. And a recipe for every number of GPUs.

    python tools/scaling.py --model llama3 --flavor 8B
    python tools/scaling.py --flavor 70B --gpus 8,64,512 --recipe
    python tools/scaling.py --flavor 70B --adapters 8 --gpus 64,512,4096 --network 25 --utilisation 0.5
    python tools/scaling.py --gpus 8 --tokens 1024 --length 512 --micro-batches 8 --records 395000   # hours of an epoch

Weak scaling: every GPU computes `--tokens` per micro-batch and `--micro-batches` per optimizer step. Bytes of the
exchange are those of the update's routes (`distributed/update`), gathers those of the FSDP2 groups; both equal what
the collectives count (tests/distributed/test_scaling.py). Memory is the estimate that a run makes of itself
(docs/memory.md). Seconds are bytes over an assumed bandwidth: see docs/scaling.md for the assumptions.

--recipe: for every number of GPUs, of the meshes, of 1 to 8 sequences of --length in a micro-batch, of the modes of
activation checkpointing and of the dtypes of the masters those that are fastest and fit; bf16 masters, whose numbers
are others, only where fp32 ones do not fit. Then the options of such a run.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from titan_hd.adapters.hdpissa import HDPissaLinear, LocalHDPissaLinear
from titan_hd.components.flops import flops_per_token
from titan_hd.components.memory import Estimate as Memory
from titan_hd.components.memory import Group, Sizes, estimate_memory, fsdp_group_sizes
from titan_hd.config import job_config, manager
from titan_hd.config.command_line import ToolParser
from titan_hd.distributed.update.gradients import gradient_traffic
from titan_hd.distributed.update.plan import UpdatePlan, plan_update
from titan_hd.distributed.update.route import Collective
from titan_hd.distributed.update.routes import ROUTES
from titan_hd.distributed.update.topology import WIRE_BYTES, Topology
from titan_hd.errors import UserError
from titan_hd.fitting import usable_bytes
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import DecoderConfig, flavor_config

# Seconds of the host for one layer: forward and backward pass of a micro-batch, not compiled, by the mode of activation
# checkpointing (`benchmarks.bench_checkpointing`), and an optimizer step beside the fold's products, in which the GPU
# waits for it (`benchmarks.bench_host`).
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
    masters: their dtype."""

    config: DecoderConfig
    rank: int = 16
    tokens: int = 8192
    length: int = 8192
    micro_batches: int = 1
    records: int = 0
    wire_bytes: int = 4
    local_steps: int = 1
    checkpointing: str = "full"
    masters: str = "float32"

    def epoch_hours(self, gpus: int, step: float) -> float:
        """Of an epoch's records, with steps of so many seconds."""
        return self.records / (gpus * self.micro_batches * self.tokens / self.length) * step / 3600

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Every linear layer of the blocks under its full name."""
        linears = self.config.linear_shapes().items()
        blocks = range(self.config.num_hidden_layers)
        return {f"model.layers.{i}.{name}": shape for i in blocks for name, shape in linears}

    @property
    def largest_k(self) -> int:
        """Most adapters with K * r directions in every weight."""
        return min(min(shape) for shape in self.shapes().values()) // self.rank


@dataclass(frozen=True)
class Estimate:
    """One row: seconds per step, bytes received per GPU and step. Of several steps for one fold the averages.

    needs: computes `memory`; beside: of `exchange`, the seconds that run beside the compute; host: of launching the
    compute; gap: in which the GPU waits for the host.
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
    needs: Callable[[], float]
    beside: float = 0.0
    host: float = 0.0
    gap: float = 0.0

    @functools.cached_property
    def memory(self) -> float:
        """Bytes of a GPU."""
        return self.needs()

    @property
    def step(self) -> float:
        """Gathers, launches and gradients of all adapters run beside the compute, the rest of the exchange after it."""
        return max(self.compute, self.gathers + self.beside, self.host) + self.exchange - self.beside + self.gap

    @property
    def efficiency(self) -> float:
        return self.compute / self.step


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def fsdp_gathers(config: DecoderConfig, shards: int, element: int, trained: bool = False, passes: int = 2) -> list[int]:
    """Bytes that a GPU receives in each all-gather of the weights of one micro-batch (a forward and a backward pass).

    element: bytes of an element as gathered. trained: method full, whose backward pass wants the embedding again.
    passes: 1 where the weights stay gathered, and these are the gathers of a whole step.
    """
    sizes = [(group.shard, min(passes, group.gathers(trained))) for group in _groups(config, shards)]
    return [(shards - 1) * shard * element for shard, times in sizes for _ in range(times)]


_GROUPS: dict[tuple[str, int], list[Group]] = {}


def _groups(config: DecoderConfig, shards: int) -> list[Group]:
    key = repr(config), shards
    if key not in _GROUPS:
        with torch.device("meta"):
            _GROUPS[key] = list(fsdp_group_sizes(Decoder(config), shards))
    return _GROUPS[key]


def gradient_collectives(work: Work, topology: Topology) -> list[Collective]:
    """What brings the adapters' gradients to their holders."""
    return gradient_traffic([*work.shapes().values()], topology)


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
        hdpissa=job_config.HDPissa(num_adapters=t.num_adapters, samples=t.samples, local_steps=t.local_steps),
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
    again = 2 * weights + 4 * c.num_attention_heads * c.head_dim * work.length * c.num_hidden_layers
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
    plan = plan_update(work.shapes(), topology, exchange)
    gathers, gathered = gather_seconds(work, topology, cluster)
    fold, gradients = exchange_seconds(work, plan, cluster)
    mesh = f"{topology.dp_replicate} x {topology.dp_shard}"
    together = topology.samples == "all"
    compute = compute_seconds(work, cluster, together=topology.num_adapters if together else 1)
    return Estimate(
        topology.workers,
        topology.num_adapters,
        mesh,
        exchange,
        compute,
        gathers,
        fold + gradients,
        gathered,
        plan.received_per_step,
        lambda: memory_of(work, plan).total,
        gradients if together else 0.0,  # block by block in the backward pass; else after the last one
        *host_seconds(work, cluster),
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
    plan = plan_update(work.shapes(), Topology(1, work.rank, 1, 1))
    passing = memory_of(work, plan)
    memory = 4 * whole + 5 * per_adapter // 2 + sum(passing.passing.values()) + passing.beside
    compute = compute_seconds(dataclasses.replace(work, local_steps=1), cluster, dense_gradient=True)
    host, gap = host_seconds(work, cluster)
    exchange = wire + products
    return Estimate(
        gpus, gpus, "whole W", "authors", compute, 0.0, exchange, 0.0, received, lambda: memory, 0.0, host, gap
    )


def best(work: Work, gpus: int, num_adapters: int, exchange: str, cluster: Cluster, samples: str = "own") -> Estimate:
    """The mesh of whole nodes that fits into memory and is fastest; of those within 1% of it, the one that gathers
    least. Where none fits, the smallest one in memory."""
    shards = [s for s in range(min(gpus, cluster.node), gpus + 1) if gpus % s == 0 and s % min(gpus, cluster.node) == 0]
    topologies = [
        Topology(num_adapters, work.rank, gpus // s, s, work.wire_bytes, samples, work.local_steps)
        for s in shards
        if (s & (s - 1)) == 0
    ]
    rows = sorted((estimate(work, t, exchange, cluster) for t in topologies), key=lambda row: row.step)
    fastest = next((row for row in rows if row.memory <= cluster.memory), None)
    if fastest is None:
        return min(rows, key=lambda row: row.memory)
    close = (row for row in rows if fastest.step <= row.step <= 1.01 * fastest.step)
    return min((row for row in close if row.memory <= cluster.memory), key=lambda row: row.gathers)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(work: Work, gpu_counts: list[int], num_adapters: list[int], cluster: Cluster, samples: str = "own") -> str:
    """Rows for every number of GPUs: K of the list on both routes, K = GPUs, and the authors' scheme."""
    lines = [
        f"{'GPUs':>5} {'K':>5}  {'mesh':<10}{'route':<8} {'compute':>8} {'gathers':>8} {'host':>7} {'exchange':>8}"
        f" {'gap':>6} {'step s':>8} {'of ideal':>8} {'GB gathered':>11} {'exchanged':>9} {'GB needed':>9}"
        f"{'    hours' if work.records else ''}"
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
    seconds = f" {row.compute:>8.3f} {row.gathers:>8.3f} {row.host:>7.3f} {row.exchange:>8.3f} {row.gap:>6.3f}"
    seconds += f" {row.step:>8.3f}"
    sizes = f" {row.efficiency:>8.1%} {row.gathered / 1e9:>11.2f} {row.exchanged / 1e9:>9.3f} {row.memory / 1e9:>9.1f}"
    sizes += f" {work.epoch_hours(row.gpus, row.step):>8.1f}" if work.records else ""
    return head + seconds + sizes + ("  does not fit" if row.memory > memory else "")


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

_CHECKPOINTING, _SEQUENCES = ("none", "selective", "full"), (1, 2, 4, 8)


@dataclass(frozen=True)
class Recipe:
    """A way to run on so many GPUs. work, row: of one step."""

    work: Work
    row: Estimate

    @property
    def sequences(self) -> int:
        """Of a micro-batch."""
        return self.work.tokens // self.work.length

    @property
    def global_batch(self) -> int:
        return self.row.gpus * self.work.micro_batches * self.sequences

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.global_batch * self.work.length / self.row.step

    def options(self) -> str:
        """Of ./run_train.sh."""
        replicas = self.row.mesh.partition(" x ")[0]
        options = {
            "hdpissa.num_adapters": self.row.num_adapters,
            "training.local_batch_size": self.sequences,
            "training.global_batch_size": self.global_batch,
            "training.master_dtype": self.work.masters,
            "activation_checkpoint.mode": self.work.checkpointing,
            "parallelism.data_parallel_replicate_degree": replicas,
        }
        return " ".join(f"--{key} {value}" for key, value in options.items())


def recipe(work: Work, gpus: int, num_adapters: int, cluster: Cluster, samples: str = "own") -> Recipe | None:
    """The way that computes most tokens per second, of those that fit; of those within 1% of it, the one that needs
    least memory. None: none fits. work: without sequences, checkpointing and masters; its micro_batches are those of an
    adapter where a GPU has several, else of a GPU."""
    hosted = max(1, num_adapters // gpus) if samples == "own" else 1
    for masters in ("float32", "bfloat16"):
        ways = [
            dataclasses.replace(
                work,
                tokens=sequences * work.length,
                micro_batches=hosted * work.micro_batches,
                checkpointing=checkpointing,
                masters=masters,
            )
            for checkpointing in _CHECKPOINTING
            for sequences in _SEQUENCES
        ]
        found = [Recipe(way, best(way, gpus, num_adapters, "factors", cluster, samples)) for way in ways]
        found = [one for one in found if one.row.memory <= cluster.memory]
        if found:
            most = max(one.tokens_per_second for one in found)
            return min((o for o in found if o.tokens_per_second >= most / 1.01), key=lambda o: o.row.memory)
    return None


def recipes(work: Work, gpu_counts: list[int], num_adapters: int, cluster: Cluster, samples: str = "own") -> str:
    """A row for every number of GPUs, and then their options."""
    lines = [
        f"{'GPUs':>5} {'K':>3}  {'mesh':<9} {'batch':>5} {'micro':>5} {'global':>6}  {'checkpointing':<13}"
        f" {'masters':<8} {'GB':>6} {'step s':>8} {'tokens/s':>11} {'of ideal':>8}{'    hours' if work.records else ''}"
    ]
    options = []
    for gpus in gpu_counts:
        found = recipe(work, gpus, num_adapters, cluster, samples)
        if found is None:
            lines.append(f"{gpus:>5} {num_adapters:>3}  does not fit, whatever is set")
            continue
        row, way = found.row, found.work
        lines.append(
            f"{gpus:>5} {num_adapters:>3}  {row.mesh:<9} {found.sequences:>5} {way.micro_batches:>5}"
            f" {found.global_batch:>6}  {way.checkpointing:<13} {way.masters:<8} {row.memory / 1e9:>6.1f}"
            f" {row.step:>8.3f} {found.tokens_per_second:>11,.0f} {row.efficiency:>8.1%}"
            + (f" {way.epoch_hours(gpus, row.step):>8.1f}" if way.records else "")
        )
        options.append(f"{gpus:>5}: {found.options()}")
    return "\n".join([*lines, "", *options])


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
    parser.add_argument("--card", type=float, default=80, help="GiB of a GPU, as it is sold")
    parser.add_argument("--checkpointing", choices=_CHECKPOINTING, default="full", help="as activation_checkpoint.mode")
    parser.add_argument("--masters", choices=["float32", "bfloat16"], default="float32", help="training.master_dtype")
    parser.add_argument("--host", type=float, default=1, help="times the host's seconds that were measured; 0: none")
    parser.add_argument("--recipe", action="store_true", help="what to set, in place of the table")
    args = parser.parse_args()
    try:
        config, sizes = flavor_config(args.model, args.flavor), (args.tokens, args.length, args.micro_batches)
        work = Work(config, args.rank, *sizes, args.records, WIRE_BYTES[args.exchange_dtype], args.local_steps)
        work = dataclasses.replace(work, checkpointing=args.checkpointing, masters=args.masters)
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    cluster = Cluster(
        nvlink=args.nvlink * 1e9,
        network=args.network * 1e9,
        peak=args.peak * 1e12,
        utilisation=args.utilisation,
        memory=usable_bytes(args.card),
        host=args.host,
    )
    if args.local_steps < 1 or (args.local_steps > 1 and args.samples == "all"):
        manager.exit_with(["--local-steps: a number of steps, at least 1, and above that with --samples own alone"])
    gpus, adapters = ([int(part) for part in text.split(",")] for text in (args.gpus, args.adapters))
    odd = [(k, n) for n in gpus for k in adapters if max(k, n) % min(k, n)]
    if odd:
        k, n = odd[0]
        manager.exit_with([f"--adapters: {k} adapters cannot be dealt to {n} GPUs; one number must divide the other"])
    model = f"{args.model} {args.flavor}, r = {args.rank}"
    if args.recipe:
        print(f"{model}, sequences of {args.length} tokens, cards of {args.card:g} GiB")
        print("\n\n".join(recipes(work, gpus, k, cluster, args.samples) for k in adapters))
        return
    print(f"{model}, {args.micro_batches} x {args.tokens} tokens per GPU and step")
    print(table(work, gpus, adapters, cluster, args.samples))


if __name__ == "__main__":
    main()
