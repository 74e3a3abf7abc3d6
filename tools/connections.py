"""Sockets of the ranks of a run, and what they put into the store by which they find each other: counted.

    python tools/connections.py                                     # on paper, 8 to 4,096 GPUs
    python tools/connections.py --gpus 512 --shard 16 --adapters 64
    python tools/connections.py --measure 16                        # real processes on this machine, beside the paper

On paper: a world of so many ranks is one process here, and the groups are those that a run makes of it
(`distributed/groups.py`). Counted is what gloo opens: a socket that listens for each group, and one for each partner in
the collectives that a run calls in it. nccl's own are not: it connects rings and trees, each rank to a few others.
"eager": the same were gloo in every group, as beside nccl by default, and all ranks connected when a group is made.

Measured: a run on gloo processes with a mesh of two replicas, two steps and a checkpoint; the sockets that each process
has then, beside those that the collectives it has called come to. The status is 1 if they are not the same.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.console import init_logging
from titan_hd.distributed.groups import LAZY
from titan_hd.distributed.parallel_dims import ParallelDims, holders_error
from titan_hd.preflight import plan_run
from titan_hd.train import Trainer

# Of gloo's record of a rank in the store: two lengths, a socket's address, and one number per rank where all connect.
_RECORD_BYTES, _NUMBER_BYTES = 8 + 8 + 128, 8

# ---------------------------------------------------------------------------------------------------------------------
# Partners


class Call(NamedTuple):
    """A collective by torch's name. root: of those that have one, or the other rank of a send or receive; in the
    group's numbers."""

    name: str
    root: int = 0


# What ranks call on the host: over the world (`distributed/collectives.py`; objects reach rank 0 on the connections
# of a broadcast), for checkpoints over the world again, and over the ranks that write them.
# tests/distributed/test_connections.py has a run call nothing else.
WORLD_CALLS = {Call("barrier"), Call("allreduce_"), Call("broadcast_")}
CHECKPOINT_CALLS = {Call("allreduce_"), Call("broadcast_")}


def partners(call: Call, rank: int, size: int) -> set[int]:
    """The ranks of a group of `size` with which gloo lets one rank talk in a collective.

    Raises:
        KeyError: a collective of which this is not known.
    """
    others, steps = set(range(size)) - {rank}, [2**i for i in range((size - 1).bit_length())]
    ring = {(rank + 1) % size, (rank - 1) % size}
    if call.name in ("gather_", "scatter_"):
        return others if rank == call.root else {call.root}
    if call.name in ("send", "recv_"):
        return {call.root}
    if call.name == "broadcast_":  # a tree: of the ranks counted from the root, 1 talks to 0, then 2, 3 to 0, 1, ...
        place = (rank - call.root) % size
        talks = [step for step in steps if place < 2 * step and (place ^ step) < size]
        return {((place ^ step) + call.root) % size for step in talks}
    found = {
        "allreduce_": ring,
        "allgather_": ring,
        "_allgather_base_": ring,
        "alltoall_base_": others,
        "barrier": {(rank + sign * step) % size for step in steps for sign in (1, -1)},
    }
    return found[call.name] & others


def sockets(calls: set[Call], rank: int, size: int) -> int:
    """Connections of a rank in one group."""
    return len(set().union(*(partners(call, rank, size) for call in calls)))


# ---------------------------------------------------------------------------------------------------------------------
# On paper


class Made(NamedTuple):
    """A group that a run asks torch for. backend: as given to torch."""

    ranks: tuple[int, ...]
    backend: str


def mesh_groups(replicate: int, shard: int, tp: int, num_adapters: int, rank: int = 0) -> list[Made]:
    """What a rank of a run on GPUs asks torch for, beside the world: the groups of its meshes, and of other ranks'."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    asked: list[Made] = []
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=replicate * shard * tp)
    new_group = dist.new_group

    def recorded(ranks: list[int], backend: str, **options: Any) -> object:
        asked.append(Made(tuple(ranks), backend))
        return new_group(ranks, backend="fake", **options)

    backends = mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl")
    try:
        with mock.patch.object(dist, "new_group", recorded), backends:
            dims = ParallelDims(replicate, shard, "cuda", tp)
            dims.adapter_mesh(num_adapters)
            dims.one_of_each_holder(num_adapters)
    finally:
        dist.destroy_process_group()
    return asked


class Row(NamedTuple):
    """asked: how often a rank asks torch for a group. gloo: groups of a rank that have gloo. first, most: sockets of
    rank 0, and the most of another one. written, read: bytes of gloo's records, by all ranks together."""

    scheme: str
    asked: int
    gloo: int
    first: int
    most: int
    written: int
    read: int


def writers(replicate: int, shard: int, tp: int, num_adapters: int) -> list[int]:
    """Ranks that write a checkpoint: those of the first replica, and the first of those that share an adapter."""
    workers = replicate * shard
    first = {*range(shard), *range(0, workers, workers // min(num_adapters, workers))}
    return [worker * tp + tp_rank for worker in sorted(first) for tp_rank in range(tp)]


def as_made(replicate: int, shard: int, tp: int, num_adapters: int) -> Row:
    """The groups of a run of ours on GPUs."""
    size = replicate * shard * tp
    asked, record = mesh_groups(replicate, shard, tp, num_adapters), _RECORD_BYTES + len(socket.gethostname())
    beside = sum("gloo" in made.backend for made in asked if 0 in made.ranks)
    assert not beside, "groups of a mesh have nccl alone"
    writing = writers(replicate, shard, tp, num_adapters)
    everybody = list(range(size))
    host = [(WORLD_CALLS, everybody), (CHECKPOINT_CALLS, everybody)]
    if len(writing) < size:  # else they write in the checkpoints' group
        host.append((CHECKPOINT_CALLS, writing))
    opened, read, written = [0] * size, 0, 0
    for calls, members in host:
        written += record * len(members)
        for place, rank in enumerate(members):
            found = sockets(calls, place, len(members))
            opened[rank] += found + 1  # with the one that listens
            read += record * found
    return Row("made", len(asked) + len(host) - 1, len(host), opened[0], max(opened[1:]), written, read)


def eager(replicate: int, shard: int, tp: int, num_adapters: int) -> Row:
    """The same by torch's defaults: every dimension of a mesh has groups of its own, unless they are the whole world,
    and all of them the world's backends; gloo connects all ranks at once."""
    workers, size = replicate * shard, replicate * shard * tp
    holders = min(num_adapters, workers)
    dimensions = [replicate, shard, tp, holders, workers // holders, tp, *([workers] if replicate > 1 else [])]
    own = [members for members in dimensions if members < size]
    groups = [size, size, *own]  # the world and the checkpoints' first
    record = _RECORD_BYTES + len(socket.gethostname())
    records = [record + _NUMBER_BYTES * members for members in groups]
    opened = sum(members - 1 for members in groups) + len(groups)
    read = size * sum(members * length for members, length in zip(groups, records))
    asked = 1 + sum(size // members for members in own)
    return Row("eager", asked, len(groups), opened, opened, size * sum(records), read)


def table(gpus: list[int], shard: int, tp: int, num_adapters: int) -> str:
    """Two rows for every number of GPUs."""
    columns = "GPUs, mesh, K, groups, asked for, of gloo, sockets: rank 0, another, MB written, MB read"
    head = columns.split(", ")
    lines: list[Sequence[str]] = [head]
    for size in gpus:
        shards = min(shard, size // tp)
        replicas = size // shards // tp
        mesh = f"{replicas} x {shards}" + (f" x {tp}" if tp > 1 else "")
        for row in (as_made(replicas, shards, tp, num_adapters), eager(replicas, shards, tp, num_adapters)):
            counts = [str(count) for count in (row.asked, row.gloo, row.first, row.most)]
            megabytes = [f"{count / 1e6:.3f}" for count in (row.written, row.read)]
            lines.append([str(size), mesh, str(num_adapters), row.scheme, *counts, *megabytes])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Measured


class Recorder(TorchDispatchMode):
    """The collectives that the main thread calls in each group: its ranks, and the calls. `_reduce_scatter_base_` of
    gloo, which a run does not call, is not known to `partners`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[dist.ProcessGroup, set[Call]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            place = next(n for n, arg in enumerate(args) if isinstance(arg, torch.ScriptObject))
            after = args[place + 1] if len(args) > place + 1 else 0
            root = after if isinstance(after, int) and not isinstance(after, bool) else 0
            name = func.overloadpacket.__name__
            self.calls.setdefault(dist.ProcessGroup.unbox(args[place]), set()).add(Call(name, root))
        return func(*args, **(kwargs or {}))

    def computed(self) -> int:
        """Connections of this rank in all groups of gloo."""
        return sum(sockets(calls, group.rank(), group.size()) for group, calls in self.calls.items())


def connected() -> int:
    """TCP sockets of this process that are connected."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # no socket, or one that is not connected
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(descriptor))) as one:
                    found += one.family in (socket.AF_INET, socket.AF_INET6) and bool(one.getpeername())
    return found


class Counts(NamedTuple):
    """Connections of a rank: `computed` from what it has called, and `counted`. calls: by the groups' descriptions."""

    computed: int
    counted: int
    calls: dict[str, set[Call]]


def count(argv: list[str], before: int) -> Counts:
    """Of this rank, in a process group of gloo, after two steps of a run and a checkpoint. Collective.

    argv: of the run. before: sockets that were connected before the process group.
    """
    with Recorder() as recorder:
        dist.barrier()  # as `process.worker` does
        config = manager.load(argv)
        trainer = Trainer(config, plan_run(config, dist.get_world_size()), torch.device("cpu"))
        trainer.train_step()
        trainer.train_step()
        trainer.save()
        dist.barrier()
    calls = {group.group_desc: calls for group, calls in recorder.calls.items()}
    found = Counts(recorder.computed(), connected() - before, calls)
    dist.barrier()  # nobody leaves before all have counted
    trainer.close()
    return found


def _work(rank: int, size: int, folder: Path, lazily: bool, results: Any) -> None:
    torch.set_num_threads(1)
    for name, value in LAZY.items():
        os.environ[name] = value if lazily else "0"
    init_logging(rank=1)  # quiet
    before = connected()
    store = dist.FileStore(str(folder / "store"), size)
    patience = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    found = count(_run_of(size, folder), before)
    results.put((rank, found, (folder / "store").stat().st_size))
    results.close()
    results.join_thread()  # what a queue has taken, a thread sends: os._exit would end it on the way
    dist.barrier()
    os._exit(0)


def _run_of(size: int, folder: Path) -> list[str]:
    """Options of a tiny run on two replicas, with one adapter for two workers."""
    options = {
        "job.dump_folder": folder / "dump",
        "model.name": "llama3",
        "model.flavor": "debugmodel",
        "data.train": folder / "records.jsonl",
        "data.format": "tokens",
        "training.steps": 2,
        "training.seq_len": 16,
        "training.global_batch_size": size,
        "hdpissa.num_adapters": size // 2,
        "adapter.rank": 1,
        "parallelism.data_parallel_replicate_degree": 2,
        "checkpoint.enable": "true",
    }
    return [f"--{key}={value}" for key, value in options.items()]


def measure(size: int, lazily: bool) -> list[Counts]:
    """Of every rank of a run on so many processes of this machine, which are forked."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = json.dumps({"input_ids": list(range(16)), "labels": list(range(16))}) + "\n"
        (folder / "records.jsonl").write_text(record * size, encoding="utf-8")
        context = mp.get_context("fork")
        results = context.Queue()
        processes = [context.Process(target=_work, args=(n, size, folder, lazily, results)) for n in range(size)]
        for process in processes:
            process.start()
        found = sorted(results.get(timeout=600) for _ in processes)
        for process in processes:
            process.join()
    print(f"{size} processes, {found[0][2]:,} bytes in the store")
    return [counts for _, counts, _ in found]


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--gpus", default="8,64,512,4096", help="numbers of GPUs")
    parser.add_argument("--shard", type=int, default=8, help="shards of the weights; the rest are replicas")
    parser.add_argument("--tp", type=int, default=1, help="ranks of tensor parallelism")
    parser.add_argument("--adapters", type=int, default=8, help="K")
    parser.add_argument("--measure", type=int, default=0, help="count in so many processes of this machine")
    parser.add_argument("--connect-all", action="store_true", help="measure with all ranks connected at once")
    args = parser.parse_args()
    if not args.measure:
        gpus = [int(part) for part in args.gpus.split(",")]
        faults = [f"--adapters: {line}" for n in gpus if (line := holders_error(args.adapters, n // args.tp))]
        faults += [
            f"--gpus: {n} is not a multiple of {args.tp} x {min(args.shard, n // args.tp)}"
            for n in gpus
            if n % (args.tp * min(args.shard, n // args.tp or 1))
        ]
        if faults:
            manager.exit_with(faults)
        print(table(gpus, args.shard, args.tp, args.adapters))
        return
    found = measure(args.measure, not args.connect_all)
    for rank, counts in enumerate(found):
        print(f"rank {rank:>3}: computed {counts.computed:>4}, counted {counts.counted:>4}")
    sys.exit(any(counts.computed != counts.counted for counts in found))


if __name__ == "__main__":
    main()
