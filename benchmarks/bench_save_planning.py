"""What the ranks of a large run send rank 0 at a save, and what rank 0 makes of it, while the training waits or not.

    python -m benchmarks.bench_save_planning [--ranks 512 4096] [--mesh 1x4096] [--method hdpissa] [--planner dcp]

Nothing is trained or written: the state of a model (8B of Llama 3, method hdpissa with K = 8) is laid out without
memory on the mesh of so many ranks, and each rank's part of a save is computed in turn in this process. Then a process
for itself does what rank 0 does in a save: unpickles what the ranks send, makes the table of contents and pickles it;
in the second save as well, in which nothing has changed. CPU: processor time, which other programs on the machine
disturb far less than the clock. Peak: memory of that process above what it had before.

Launches: how many small operations that process's main thread gets done per second, and milliseconds of the slowest,
while another thread makes the table, as in an asynchronous save; and alone.

--planner dcp: with torch.distributed.checkpoint's own planner over one tensor for each layer and all ranks, as
torch.distributed.checkpoint.save does it.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing as mp
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.common import environment, print_header, print_json, print_table
from titan_hd.checkpoint.pieces import Stored, owned_pieces, stored_tensors
from titan_hd.checkpoint.table import TableOfContents
from titan_hd.checkpoint.writer import Entry
from titan_hd.components.assembly import assemble
from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.preflight import plan_run

_FRAME = 1200  # bytes that torch.save adds


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--flavor", default="8B")
    parser.add_argument("--method", default="hdpissa")
    parser.add_argument("--adapters", type=int, default=8, help="K")
    parser.add_argument("--ranks", type=int, nargs="+", default=[512, 4096], help="worlds, in shards of 8 and in one")
    parser.add_argument("--mesh", nargs="*", default=[], help="replicas x shards, in place of --ranks: 64x8")
    parser.add_argument("--planner", choices=["titan_hd", "dcp"], default="titan_hd")
    args = parser.parse_args()
    env = environment(torch.device("cpu"), 1)
    print_header(f"planning a save of {args.flavor}, method {args.method}, by {args.planner}", env)
    meshes = [tuple(map(int, mesh.split("x"))) for mesh in args.mesh]
    meshes = meshes or [mesh for ranks in args.ranks for mesh in ((ranks // 8, 8), (1, ranks))]
    results: dict[str, Any] = {}
    for replicate, shard in meshes:
        results[f"{replicate} x {shard}"] = _measure(args, replicate, shard)
    columns = [
        "mesh",
        "writers",
        "items a rank",
        "items",
        "MB sent",
        "first s",
        "CPU s",
        "second CPU s",
        "peak MB",
        "table MB",
    ]
    keys = [
        "writers",
        "most_items",
        "items",
        "sent_mb",
        "first_s",
        "first_cpu_s",
        "second_cpu_s",
        "peak_mb",
        "table_mb",
    ]
    print_table(columns, [[mesh, *(result[key] for key in keys)] for mesh, result in results.items()])
    if args.planner == "titan_hd":
        columns = ["mesh", "launches/s alone", "while planning", "slowest ms alone", "while planning"]
        keys = ["per_s_alone", "per_s_planning", "slowest_ms_alone", "slowest_ms_planning"]
        print_table(columns, [[mesh, *(result[key] for key in keys)] for mesh, result in results.items()])
    print_json("save_planning", env, results)


def _measure(args: argparse.Namespace, replicate: int, shard: int) -> dict[str, Any]:
    ranks = replicate * shard
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        tensors = _state(args, replicate, shard)
        sent = _by_dcp(tensors, ranks) if args.planner == "dcp" else _by_titan_hd(tensors, ranks)
    finally:
        dist.destroy_process_group()
    counts, parts, stored = sent
    here, there = mp.get_context("spawn").Pipe()
    work = _rank_zero_of_dcp if args.planner == "dcp" else _rank_zero
    process = mp.get_context("spawn").Process(target=work, args=(there, parts, stored))
    process.start()
    result = here.recv()
    process.join()
    size = sum(map(len, parts)) / 1e6
    return {"writers": len(parts), "most_items": max(counts), "items": sum(counts), "sent_mb": size} | result


def _state(args: argparse.Namespace, replicate: int, shard: int) -> dict[str, torch.Tensor]:
    """What a run saves, as rank 0 has it, without memory; moments as AdamW makes them."""
    argv = ["--model.name=llama3", f"--model.flavor={args.flavor}", f"--adapter.method={args.method}"]
    argv += [
        f"--parallelism.data_parallel_replicate_degree={replicate}",
        "--data.train=none.jsonl",
        "--training.steps=1",
    ]
    argv += [f"--hdpissa.num_adapters={args.adapters}"] if args.method == "hdpissa" else []
    plan = plan_run(manager.load(argv), replicate * shard, needs_files=False, device_type="cpu")
    dims = ParallelDims(replicate, shard, "cpu")
    update = assemble(plan.config, plan.decoder, plan.method, dims, plan.untouched)[1]
    update.build_optimizer(torch.device("meta"))
    for group in update.optimizer.param_groups:
        for parameter in group["params"]:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            update.optimizer.state[parameter] = {"step": torch.ones(()), **moments}
    return update.state(changed_only=plan.config.checkpoint.base == "delta")


def _stand_at(rank: int, meshes: list[DeviceMesh]) -> None:
    """Let every mesh believe that this process is the rank."""
    for mesh in meshes:
        mesh._coordinate_on_dim = tuple((mesh.mesh == rank).nonzero()[0].tolist())


def _meshes(tensors: dict[str, torch.Tensor]) -> list[DeviceMesh]:
    return list({id(t.device_mesh): t.device_mesh for t in tensors.values() if isinstance(t, DTensor)}.values())


def _by_titan_hd(tensors: dict[str, torch.Tensor], ranks: int) -> tuple[list[int], list[bytes], list[Stored]]:
    """How many items each writer has, what it sends, and what rank 0 knows itself."""
    counts, parts, meshes, stored = [], [], _meshes(tensors), stored_tensors(tensors)
    for rank in range(ranks):
        _stand_at(rank, meshes)
        entries, start = [], 0
        for piece in owned_pieces(stored, rank):
            length = piece.nbytes + _FRAME
            entries.append(Entry(piece.tensor.name, piece.offsets, piece.sizes, f"__{rank}_0.distcp", start, length))
            start += length
        if entries:
            counts.append(len(entries))
            parts.append(pickle.dumps((rank, entries)))
    return counts, parts, list(stored)


def _rank_zero(pipe, parts: list[bytes], stored: list[Stored]) -> None:
    gc.disable()  # as in a run
    table, before = TableOfContents(), _forget_peak()
    alone = _launches(lambda: time.sleep(1))

    def plan(parts: list[bytes]) -> bytes:
        for part in parts:
            table.update(*pickle.loads(part))
        return table.content(stored)

    first, first_cpu, content = _timed(lambda: plan(parts))
    _, second_cpu, _ = _timed(lambda: plan([pickle.dumps((rank, None)) for rank in range(len(parts))]))
    peak = _memory("VmHWM")
    table = TableOfContents()
    planning = _launches(lambda: plan(parts))
    pipe.send(
        {
            "first_s": first,
            "first_cpu_s": first_cpu,
            "second_cpu_s": second_cpu,
            "peak_mb": (peak - before) / 1e6,
            "table_mb": len(content) / 1e6,
            "per_s_alone": alone[0],
            "per_s_planning": planning[0],
            "slowest_ms_alone": alone[1],
            "slowest_ms_planning": planning[1],
        }
    )


def _launches(work: Callable[[], object]) -> tuple[float, float]:
    """Small operations per second of this thread while another one does the work, and milliseconds of the slowest."""
    thread, one = threading.Thread(target=work), torch.zeros(8)
    thread.start()
    count, slowest, start = 0, 0.0, time.perf_counter()
    last = start
    while thread.is_alive():
        one.add_(1)
        now = time.perf_counter()
        count, slowest, last = count + 1, max(slowest, now - last), now
    return count / (last - start), 1e3 * slowest


def _forget_peak() -> int:
    """Bytes that this process has now; its peak counts from here on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds on the clock, of processor time, and the result."""
    start, cpu = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - start, time.process_time() - cpu, result


# ---------------------------------------------------------------------------------------------------------------------
# torch.distributed.checkpoint's own planning


def _by_dcp(tensors: dict[str, torch.Tensor], ranks: int) -> tuple[list[int], list[bytes], list[Stored]]:
    """The same of DCP's planner, over the tensors by name, with a count of steps for each."""
    meshes, counts, parts = _meshes(tensors), [], []
    step = tensors.pop("optimizer.step")
    tensors |= {key.replace(".exp_avg_sq", ".step"): step for key in list(tensors) if key.endswith(".exp_avg_sq")}
    made: dict[Any, SavePlan] = {}
    for rank in range(ranks):
        _stand_at(rank, meshes)
        held = _parts_held(tensors)
        plan = made[held] = made.get(held) or _plan_by_dcp(tensors)
        counts.append(len(plan.items))
        parts.append(pickle.dumps(plan))
    return counts, parts, []


def _parts_held(tensors: dict[str, torch.Tensor]) -> frozenset:
    """Equal for ranks that hold the same, which have the same plan."""
    found = set()
    for tensor in tensors.values():
        if isinstance(tensor, DTensor):
            at = zip(tensor.device_mesh.get_coordinate() or (), tensor.placements)
            found.add((id(tensor.device_mesh), *((i, place) for i, (place, p) in enumerate(at) if p.is_shard())))
    return frozenset(found)


def _plan_by_dcp(tensors: dict[str, torch.Tensor]) -> SavePlan:
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=False)
    return planner.create_local_plan()


def _rank_zero_of_dcp(pipe, parts: list[bytes], _: list[Stored]) -> None:
    before = _forget_peak()

    def plan() -> bytes:
        planner, writer = dcp.DefaultSavePlanner(), dcp.FileSystemWriter("none")
        plans, metadata = planner.create_global_plan([pickle.loads(part) for part in parts])
        plans = writer.prepare_global_plan(plans)
        sent_back = [pickle.dumps(plan) for plan in plans]
        del plans
        metadata.storage_data = {}
        for part in sent_back:  # the ranks' results, about as large
            metadata.storage_data |= {item.index: item.index for item in pickle.loads(part).items}
        return pickle.dumps(metadata)

    first, cpu, content = _timed(plan)
    peak = _memory("VmHWM")
    seconds = {"first_s": first, "first_cpu_s": cpu, "second_cpu_s": cpu}  # it is the same again
    pipe.send(seconds | {"peak_mb": (peak - before) / 1e6, "table_mb": len(content) / 1e6})


if __name__ == "__main__":
    main()
