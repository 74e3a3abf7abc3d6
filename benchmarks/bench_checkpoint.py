"""How long a save stops the training, synchronous and asynchronous, and what it costs while it is being written.

    python -m benchmarks.bench_checkpoint [--megabytes 1024] [--workers 2] [--folder DIR]

Every worker holds its shards of matrices of 4 MB, together `megabytes`, and "trains" by changing them in place, which
is also what the copy must be protected from. Stopped: seconds until `save` returns. Written: seconds until the
checkpoint is there under its name. Step: one change of all shards, alone and while a checkpoint is being written.
Checked: seconds of the check of all files before a resumption, on all workers together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.common import environment, print_header, print_json, print_table
from titan_hd.checkpoint.checkpointer import Checkpointer
from titan_hd.checkpoint.folder import CheckpointFolder
from titan_hd.config.command_line import ToolParser

_SIDE = 1024
_STATE = {"step": 0, "base": "full", "identity": {}, "config": ""}


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to write; default: a temporary folder")
    args = parser.parse_args()
    env = environment(torch.device("cpu"), 1)
    print_header(f"a checkpoint of {args.megabytes} MB on {args.workers} workers", env)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_worker, (args, folder, queue), nprocs=args.workers)
        results = queue.get()
    columns = ["mode", "stopped s", "written s", "step s", "step while writing s"]
    keys = ["stopped", "written", "step", "step_while_writing"]
    print_table(columns, [[mode, *(results[mode][key] for key in keys)] for mode in ("disabled", "async")])
    print(f"checked in {results['checked']:.2f} s ({args.megabytes / 1e3 / results['checked']:.2f} GB/s)")
    print_json("checkpoint", env, results)


def _worker(rank: int, args: argparse.Namespace, folder: str, queue) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), args.workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
    mesh = init_device_mesh("cpu", (args.workers,))
    count = max(1, args.megabytes * 10**6 // (4 * _SIDE * _SIDE))
    locals_ = [torch.randn(_SIDE // args.workers, _SIDE) for _ in range(count)]
    tensors = {f"model.{i}": DTensor.from_local(local, mesh, [Shard(0)]) for i, local in enumerate(locals_)}
    results: dict[str, Any] = {
        mode: _measure(Path(folder) / mode, mode, tensors, locals_, args) for mode in ("disabled", "async")
    }
    checkpointer = Checkpointer(CheckpointFolder(Path(folder) / "async", 1), False, 600)
    results["checked"] = _timed(lambda: checkpointer.choose(-1))
    if rank == 0:
        queue.put(results)
    dist.barrier()
    dist.destroy_process_group()


def _measure(folder: Path, mode: str, tensors, locals_: list[torch.Tensor], args) -> dict[str, float]:
    """Medians over the saves, but for the first one, which allocates the copies."""
    checkpointer = Checkpointer(CheckpointFolder(folder, 1), mode == "async", 600)
    times: dict[str, list[float]] = {"stopped": [], "written": [], "step": [], "step_while_writing": []}

    def step() -> float:
        return _timed(lambda: torch._foreach_mul_(locals_, 1.0001))

    for number in range(1, args.saves + 2):
        times["step"].append(step())
        dist.barrier()
        start = time.perf_counter()
        checkpointer.save(number, tensors, {**_STATE, "step": number})
        times["stopped"].append(time.perf_counter() - start)
        times["step_while_writing"].append(step())
        assert checkpointer.wait() is None
        times["written"].append(time.perf_counter() - start)
    checkpointer.close()
    return {key: statistics.median(values[1:]) for key, values in times.items()}


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
