"""The fold: K adapters' updates onto the shards of W, over all seven weights of a transformer block.

    python -m benchmarks.bench_update                          # CPU: spawns 4 gloo workers with one thread each
    python -m benchmarks.bench_update --true-8b                # plans Llama-3.1-8B on 8 workers; on a GPU also runs it
    python -m benchmarks.bench_update --cases 4096x14336k1024r16b2 --workers 1 --adapters 8

On a machine with GPUs there is one worker per GPU over nccl, and with one GPU everything runs in this process (K = 8
adapters on it). A case is hidden x intermediate, k rows of k_proj and v_proj (hidden if absent), r rank, b blocks.

Variants, interleaved in one run, on the same adapters:

    authors       all-gather A_i, B_i, dA_i, dB_i from all workers; every worker forms the whole dense
                  sum_i (B_i + dB_i)(A_i + dA_i) - B_i A_i and adds its own part of it (plain tensors, written below)
    factors       titan_hd's low-rank exchange, static factors cached; "no overlap" has one bucket in flight; "int8"
                  rounds what travels, which its error shows
    dense         titan_hd's reduce-scatter of whole updates
    auto          what the plan chooses by bytes
    products      only the arithmetic of "factors", on factors that are there: what no exchange can undercut

ms is the slowest worker's, median over repetitions; "CPU time" is how much less processor time all workers together
take, which other programs on a busy machine disturb least; bytes are counted at the collectives, on rank 0; extra
memory (MiB) is the most that one fold holds beyond what stays (rank 0, untimed); "error" is the distance from the
authors' change of W, relative to that change. Expected, from a prototype of one square weight on 4 workers, times
faster than the authors' scheme in the same run: 1024 r16: dense 4.0, factors 5.0; 2048 r16: 4.8, 15.4; 2048 r64: 3.9,
8.7.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks import common
from titan_hd.adapters.hdpissa import HDPissa
from titan_hd.config.command_line import ToolParser
from titan_hd.distributed.adapter_registry import AdapterEntry, AdapterRegistry
from titan_hd.distributed.collectives import TRAFFIC, all_gather
from titan_hd.distributed.parallel_dims import ParallelDims, local_part
from titan_hd.distributed.row_shards import shard_rows
from titan_hd.distributed.update.fold import Fold, FoldSettings
from titan_hd.distributed.update.plan import plan_update
from titan_hd.distributed.update.topology import Topology
from titan_hd.models.registry import flavor_config

EXPECTED = {"1024x1024r16": (4.0, 5.0), "2048x2048r16": (4.8, 15.4), "2048x2048r64": (3.9, 8.7)}  # dense, factors
PRODUCTS = "products"  # of the variants, the one that is no whole fold
DEFAULT_CASES = [*EXPECTED, "1024x1024r16b4"]
GPU_CASES = ["4096x14336k1024r16b2", "4096x14336k1024r64b2"]


@dataclass(frozen=True)
class Case:
    label: str
    hidden: int
    intermediate: int
    kv: int
    rank: int
    blocks: int

    @staticmethod
    def parse(label: str) -> Case:
        match = re.fullmatch(r"(\d+)x(\d+)(?:k(\d+))?r(\d+)(?:b(\d+))?", label)
        if match is None:
            raise SystemExit(f"--cases: {label!r} is not like 2048x5632k512r16b2")
        hidden, intermediate, kv, rank, blocks = (int(g) if g else 0 for g in match.groups())
        return Case(label, hidden, intermediate, kv or hidden, rank, blocks or 1)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name -> (out, in), in the model's order."""
        d, ffn = self.hidden, self.intermediate
        block = {"q_proj": (d, d), "k_proj": (self.kv, d), "v_proj": (self.kv, d), "o_proj": (d, d)}
        block |= {"gate_proj": (ffn, d), "up_proj": (ffn, d), "down_proj": (d, ffn)}
        return {f"layers.{i}.{name}": shape for i in range(self.blocks) for name, shape in block.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def authors_fold(registry: AdapterRegistry, dims: ParallelDims, coefficient: float) -> None:
    """The published script's scheme: everything to everyone, and everyone forms the whole update."""
    workers, group = dims.dp_size, dims.dp_mesh.get_group()
    for entry in registry.entries.values():
        gathered = []
        for local in factors(entry):
            flat, work = all_gather(local.reshape(-1), workers, group)
            work.wait()
            gathered.append(flat.view(-1, *local.shape[1:]))
        update = torch.zeros(entry.shape, device=gathered[0].device)
        for a, b, da, db in zip(*gathered):
            update += (b + db) @ (a + da) - b @ a
        rows = entry.weight_rows()
        first, last = shard_rows(entry.shape[0], dims.dp_shard, dims.place(dims.rank).shard)
        rows.add_(update[first:last], alpha=coefficient)
        for delta in factors(entry)[2:]:
            delta.zero_()


def factors(entry: AdapterEntry) -> list[torch.Tensor]:
    """a, b, da, db of the adapters on this worker."""
    return [local_part(t.detach()) for t in (entry.a, entry.b, entry.layer.delta_A, entry.layer.delta_B)]


def make_variants(registry: AdapterRegistry, dims: ParallelDims, rank: int) -> dict[str, Callable[[], None]]:
    shapes = {name: entry.shape for name, entry in registry.entries.items()}
    topology = Topology(registry.num_adapters, rank, dims.dp_replicate, dims.dp_shard)

    def fold(exchange: str, **options) -> Callable[[], None]:
        ready = Fold(registry, dims, plan_update(shapes, topology, exchange), FoldSettings(**options))
        ready.prepare()
        return lambda: ready(lr=0.0, step=0)

    return {
        "authors": lambda: authors_fold(registry, dims, 1.0 / registry.num_adapters),
        "factors": fold("factors"),
        "factors, no overlap": fold("factors", in_flight=1),
        "factors, int8": fold("factors", wire=torch.int8),
        "dense": fold("dense"),
        "dense, no overlap": fold("dense", in_flight=1),
        "auto": fold("auto"),
        PRODUCTS: products(registry),
    }


def products(registry: AdapterRegistry) -> Callable[[], None]:
    """One product of inner size 2*K*r on this worker's rows of every weight."""
    inner = 2 * registry.num_adapters * registry.rank
    operands = []
    for entry in registry.entries.values():
        rows = entry.weight_rows()
        operands.append(
            (rows, rows.new_zeros(len(rows), inner).normal_(), rows.new_zeros(inner, rows.shape[1]).normal_())
        )

    def run() -> None:
        for rows, left, right in operands:
            rows.addmm_(left, right, alpha=1e-3)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Layers(nn.Module):
    """A container that FSDP2 accepts: it wants a forward method."""

    def __init__(self, case: Case):
        super().__init__()
        blocks = [nn.ModuleDict() for _ in range(case.blocks)]
        for name, (out, width) in case.shapes().items():
            _, block, last = name.split(".")
            blocks[int(block)][last] = nn.Linear(width, out, bias=False)
        self.layers = nn.ModuleList(blocks)

    def forward(self):
        raise NotImplementedError


def build(case: Case, num_adapters: int, device: torch.device) -> tuple[AdapterRegistry, ParallelDims]:
    """Sharded weights and random factors: the fold's time does not depend on their values."""
    dims = ParallelDims(1, dist.get_world_size(), device.type)
    with torch.device("meta"):
        model = Layers(case)
    method = HDPissa(num_adapters, case.rank)
    method.apply(model, None)
    registry = AdapterRegistry(model, method, dims.adapter_mesh(num_adapters))
    fully_shard(model, mesh=dims.fsdp_mesh, ignored_params=registry.parameters())
    model.to_empty(device=device)
    registry.materialize(device)
    torch.manual_seed(dist.get_rank())
    for name, entry in registry.entries.items():
        entry.weight_rows().zero_()
        a, b = local_part(entry.layer.delta_A), local_part(entry.layer.delta_B)
        registry.set_factors(name, 0.1 * torch.randn_like(a), 0.1 * torch.randn_like(b))
    registry.start()
    return registry, dims


@torch.no_grad()
def refill(registry: AdapterRegistry) -> None:
    """New updates for the next fold: it leaves zeros, with which a GPU computes faster."""
    for entry in registry.entries.values():
        for delta in factors(entry)[2:]:
            delta.normal_(0.0, 1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def changes(registry: AdapterRegistry, variant: Callable[[], None]) -> list[torch.Tensor]:
    """What one fold of seeded updates adds to this worker's rows."""
    torch.manual_seed(1000 + dist.get_rank())
    refill(registry)
    rows = [entry.weight_rows() for entry in registry.entries.values()]
    for weight in rows:
        weight.zero_()
    variant()
    return [weight.clone() for weight in rows]


def difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    distance = sum((g - w).double().square().sum().item() for g, w in zip(got, want))
    return (distance / sum(w.double().square().sum().item() for w in want)) ** 0.5


@torch.no_grad()
def one_pass(variant: Callable[[], None], registry: AdapterRegistry, device: torch.device) -> dict[str, Any]:
    """Bytes and memory of one fold, outside of any timing."""
    refill(registry)
    before = TRAFFIC.received
    peak = common.peak_extra_bytes(variant, device)
    return {"received_mb": (TRAFFIC.received - before) / 1e6, "peak_mib": peak / 2**20}


def timed(variants: dict[str, Callable], registry: AdapterRegistry, device, repetitions: int) -> common.Timing:
    """Interleaved; every sample starts together; the slowest worker's time counts, and the sum of processor time."""

    def before() -> None:
        refill(registry)
        common.synchronize(device)
        dist.barrier()

    with torch.no_grad():
        mine = common.interleave(variants, device, repetitions, warmup=2, before=before)
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return common.Timing(
        {name: [max(sample) for sample in zip(*(t.wall[name] for t in everyone))] for name in variants},
        {name: [sum(sample) for sample in zip(*(t.cpu[name] for t in everyone))] for name in variants},
    )


@torch.no_grad()
def print_profile(name: str, variant: Callable[[], None], registry: AdapterRegistry) -> None:
    """Where the time of three folds goes, on rank 0, by operation."""
    refill(registry)
    with torch.profiler.profile() as profile:
        for _ in range(3):
            variant()
    if dist.get_rank() == 0:
        print(f"# {name}\n{profile.key_averages().table(sort_by='self_cpu_time_total', row_limit=10)}", flush=True)


def measure(label: str, args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    case, repetitions = Case.parse(label), args.repetitions
    registry, dims = build(case, args.adapters, device)
    variants = make_variants(registry, dims, case.rank)
    reference = changes(registry, variants["authors"])
    results = {name: one_pass(variant, registry, device) for name, variant in variants.items()}
    for name, result in results.items():
        found = None if name == PRODUCTS else difference(changes(registry, variants[name]), reference)
        result["difference"] = found
    start = time.perf_counter()
    timing = timed(variants, registry, device, repetitions)
    for name, result in results.items():
        result["ms"] = statistics.median(timing.wall[name]) * 1e3
        result["fastest_ms"] = min(timing.wall[name]) * 1e3
        result["speedup"] = common.median_ratio(timing.wall, "authors", name)
        result["cpu_speedup"] = common.median_ratio(timing.cpu, "authors", name)
        result["gb_per_second"] = result["received_mb"] / result["ms"]
    if dist.get_rank() == 0:
        print(f"# {label}: {repetitions} repetitions in {time.perf_counter() - start:.0f} s", flush=True)
    for name in ("factors", "dense") if args.profile else ():
        print_profile(name, variants[name], registry)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def work(rank: int, workers: int, store: str, args: argparse.Namespace, answer) -> None:
    """One worker's life: all cases, the results of rank 0 into the queue."""
    torch.set_num_threads(args.threads)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)})
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, workers), rank=rank, world_size=workers)
    try:
        results = {label: measure(label, args, device) for label in args.cases}
        dist.barrier()  # gloo aborts a worker whose peer leaves first
        if rank == 0:
            answer(results)
    finally:
        dist.destroy_process_group()


def _spawned(rank: int, workers: int, store: str, args: argparse.Namespace, queue) -> None:
    work(rank, workers, store, args, queue.put)
    sys.stdout.flush()
    os._exit(0)  # as train.main does, and why


def run_workers(args: argparse.Namespace) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        if args.workers == 1:
            answers: list[dict] = []
            work(0, 1, store, args, answers.append)
            return answers[0]
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_spawned, (args.workers, store, args, queue), nprocs=args.workers)
        return queue.get()


# ---------------------------------------------------------------------------------------------------------------------
# Reporting


def report(label: str, args: argparse.Namespace, results: dict[str, dict]) -> None:
    print(f"\n{label}, K = {args.adapters}, {args.workers} worker(s)\n")
    expected = dict(zip(("dense", "factors"), EXPECTED.get(label, ()))) if args.workers == 4 else {}
    fastest = results["authors"]["fastest_ms"]
    rows = [
        [
            name,
            f"{r['ms']:.1f}",
            f"{r['speedup']:.2f}",
            f"{fastest / r['fastest_ms']:.2f}",
            f"{r['cpu_speedup']:.2f}",
            expected.get(name),
            f"{r['received_mb']:.2f}",
            r["gb_per_second"],
            f"{r['peak_mib']:.1f}",
            None if r["difference"] is None else f"{r['difference']:.0e}",
        ]
        for name, r in results.items()
    ]
    columns = [
        "variant",
        "ms",
        "x faster",
        "fastest runs",
        "CPU time",
        "expected",
        "MB in",
        "GB/s",
        "MiB",
        "difference",
    ]
    common.print_table(columns, rows)
    for name, value in expected.items():
        got = results[name]["speedup"]
        print(f"{name}: {got:.2f} times faster, {'at or above' if got >= value else 'BELOW'} the expected {value}")


def authors_bytes(shapes: dict[str, tuple[int, int]], t: Topology) -> int:
    """Received per worker and fold: four factors of every adapter that lives elsewhere."""
    return sum(2 * (t.num_adapters - t.hosted) * t.rank * (out + width) * 4 for out, width in shapes.values())


def plan_8b(workers: int = 8) -> dict[str, dict[str, float]]:
    """Planned bytes for Llama-3.1-8B, GB received per worker and step; nothing runs."""
    config = flavor_config("llama3", "8B")
    layers = range(config.num_hidden_layers)
    shapes = {f"model.layers.{i}.{name}": shape for i in layers for name, shape in config.linear_shapes().items()}
    planned = {}
    for rank in (16, 64, 128):
        topology = Topology(workers, rank, 1, workers)
        routes = {"factors": ("factors", None), "factors, not cached": ("factors", 0.0), "dense": ("dense", None)}
        routes["auto"] = ("auto", None)
        total = {n: sum(w.received for w in plan_update(shapes, topology, *r).weights) for n, r in routes.items()}
        planned[f"r{rank}"] = {n: b / 1e9 for n, b in {"authors": authors_bytes(shapes, topology), **total}.items()}
    print(f"\nLlama-3.1-8B, K = {workers} on {workers} workers, fp32: planned GB received per worker and step\n")
    names = list(planned["r16"])
    rows = [[rank, *(f"{values[n]:.2f}" for n in names)] for rank, values in planned.items()]
    common.print_table(["rank", *names], rows)
    return planned


def parse_args() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    gpus = torch.cuda.device_count()
    parser.add_argument("--cases", nargs="+", default=GPU_CASES if gpus else DEFAULT_CASES)
    parser.add_argument("--workers", type=int, default=gpus or 4)
    parser.add_argument("--adapters", type=int, default=0, help="K; 0: the number of workers, 8 on one worker")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--true-8b", action="store_true", help="plan the true shapes; on a CPU, only that")
    parser.add_argument("--profile", action="store_true", help="also print where factors and dense spend their time")
    args = parser.parse_args()
    args.adapters = args.adapters or (8 if args.workers == 1 else args.workers)
    for label in args.cases:
        Case.parse(label)
    return args


def main() -> None:
    args, device = parse_args(), common.pick_device()
    env = {**common.environment(device, args.threads), "workers": args.workers}
    common.print_header("bench_update", env)
    planned = plan_8b() if args.true_8b else None
    results = {}
    if not args.true_8b or device.type == "cuda":
        results = run_workers(args)
        for label, values in results.items():
            report(label, args, values)
    common.print_json("update", env, {"settings": vars(args), "cases": results, "planned_gb": planned})


if __name__ == "__main__":
    main()
