"""The device meshes of a run, and how K logical adapters map onto its data-parallel workers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from titan_hd.errors import UserError


def resolve_shard_degree(replicate: int, shard: int, tensor: int, world_size: int) -> int:
    """dp_shard with -1 replaced. ValueError if the degrees do not multiply to the number of workers."""
    if shard == -1:
        shard = world_size // (replicate * tensor)
    if replicate * shard * tensor != world_size:
        raise UserError(
            f"parallelism.data_parallel_shard_degree: replicate {replicate} x shard {shard} x tensor {tensor} is not "
            f"the number of workers, {world_size}"
        )
    return shard


@dataclass(frozen=True)
class AdapterPlacement:
    """Which adapters a data-parallel worker hosts, and which samples of a global batch it computes.

    Both maps deal out contiguous ranges, so worker w simply owns samples w*B/W to (w+1)*B/W - 1 of every global batch
    of B, in micro-batches of `local_batch_size`; sample j belongs to adapter floor(j*K/B) whoever computes it.
    """

    num_adapters: int  # K
    workers: int  # W
    rank: int  # this worker's place in the data-parallel order
    global_batch_size: int
    local_batch_size: int

    def __post_init__(self) -> None:
        error = placement_error(self.num_adapters, self.workers, self.global_batch_size, self.local_batch_size)
        if error:
            raise UserError(error)

    @property
    def hosted(self) -> int:
        """Number of adapters on this worker."""
        return max(1, self.num_adapters // self.workers)

    @property
    def first_adapter(self) -> int:
        return self.rank * self.num_adapters // self.workers

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one worker in an optimizer step."""
        return self.global_batch_size // (self.workers * self.local_batch_size)

    def samples(self, micro_batch: int) -> range:
        """Positions in the global batch that micro-batch m of this worker takes."""
        start = self.rank * self.global_batch_size // self.workers + micro_batch * self.local_batch_size
        return range(start, start + self.local_batch_size)

    def slot(self, micro_batch: int) -> int:
        """Which of the hosted adapters micro-batch m belongs to."""
        return self.adapter(micro_batch) - self.first_adapter

    def adapter(self, micro_batch: int) -> int:
        """The logical adapter that micro-batch m belongs to."""
        return self.samples(micro_batch).start * self.num_adapters // self.global_batch_size


def placement_error(num_adapters: int, workers: int, global_batch: int, local_batch: int) -> str | None:
    """One line on why K adapters and a global batch cannot be dealt to W workers, or None."""
    if max(num_adapters, workers) % min(num_adapters, workers):
        return (
            f"hdpissa.num_adapters: {num_adapters} adapters cannot be dealt to {workers} data-parallel workers; "
            "one number must divide the other"
        )
    unit = local_batch * max(num_adapters, workers)
    if global_batch % unit:
        shares = f"{num_adapters} adapters" if num_adapters >= workers else f"{workers} workers"
        return (
            f"training.global_batch_size: {global_batch} must be a multiple of {unit} "
            f"(local_batch_size {local_batch} x {shares})"
        )
    return None


_ROWS, _COLUMNS = 16, 8  # of the picture; what is more is abbreviated


def mesh_picture(dp_replicate: int, dp_shard: int, tp: int, num_adapters: int | None) -> str:
    """Which ranks hold what, as text: a line per data-parallel worker, a column per tp rank.

    num_adapters: K, or None for methods without logical adapters.
    """
    workers = dp_replicate * dp_shard
    lines = [f"mesh {dp_replicate} x {dp_shard} x {tp} (replicate x shard x tensor); ranks:"]
    columns = _abbreviated(tp, _COLUMNS)
    if tp > 1:
        lines.append(f"{'':<24}" + "".join("   ..." if c is None else f"{f'tp {c}':>6}" for c in columns))
    for worker in _abbreviated(workers, _ROWS):
        if worker is None:
            lines.append("  ...")
            continue
        replica, shard = divmod(worker, dp_shard)
        ranks = "".join("   ..." if c is None else f"{worker * tp + c:>6}" for c in columns)
        lines.append(f"  replica {replica:<4} shard {shard:<5}{ranks}{_hosted(worker, workers, num_adapters)}")
    return "\n".join(lines)


def _abbreviated(count: int, most: int) -> list[int | None]:
    """0 to count - 1, with None for those left out where they are more than `most`."""
    if count <= most:
        return list(range(count))
    return [*range(most - 2), None, count - 1]


def _hosted(worker: int, workers: int, num_adapters: int | None) -> str:
    """The adapters of a data-parallel worker, for its line."""
    if num_adapters is None:
        return ""
    first, hosted = worker * num_adapters // workers, num_adapters // workers
    if hosted > 1:
        return f"   adapters {first} to {first + hosted - 1}"
    shared = workers // num_adapters
    return f"   adapter {first}" + (f", shared by {shared} workers" if shared > 1 else "")


@dataclass
class ParallelDims:
    """Meshes over the world, made in the order (dp_replicate, dp_shard, tp).

    Attributes:
        fsdp_mesh: what `fully_shard` gets: [dp_shard], or [dp_replicate, dp_shard] for HSDP.
        dp_mesh: the data-parallel workers of this tp rank in one dimension.
        dp_rank, tp_rank: this rank's places in dp_mesh and in its tp group.
    """

    dp_replicate: int
    dp_shard: int
    device_type: str
    tp: int = 1
    world: DeviceMesh = field(init=False)
    fsdp_mesh: DeviceMesh = field(init=False)
    dp_mesh: DeviceMesh = field(init=False)
    dp_rank: int = field(init=False)
    tp_rank: int = field(init=False)

    def __post_init__(self) -> None:
        names = ("dp_replicate", "dp_shard", "tp")
        self.world = init_device_mesh(
            self.device_type, (self.dp_replicate, self.dp_shard, self.tp), mesh_dim_names=names
        )
        self.fsdp_mesh = self.world[names[:2]] if self.dp_replicate > 1 else self.world["dp_shard"]
        self.dp_mesh = self.world[names[:2]]._flatten("dp") if self.dp_replicate > 1 else self.world["dp_shard"]
        # Looked up once: every access by name builds a mesh of its own.
        self.dp_rank, self.tp_rank = self.dp_mesh.get_local_rank(), self.world["tp"].get_local_rank()

    @property
    def dp_size(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.dp_rank * self.tp + self.tp_rank

    def place(self, rank: int) -> tuple[int, int, int]:
        """(data-parallel worker, shard of W, tp rank) of a global rank."""
        worker, tp_rank = divmod(rank, self.tp)
        return worker, worker % self.dp_shard, tp_rank

    def adapter_mesh(self, num_adapters: int) -> DeviceMesh:
        """[adapter, adapter_group, tp]: min(K, W) holders of adapters x workers that share one x tensor parallelism."""
        holders = min(num_adapters, self.dp_size)
        ranks = torch.arange(self.world_size).view(holders, -1, self.tp)
        return DeviceMesh(self.device_type, ranks, mesh_dim_names=("adapter", "adapter_group", "tp"))


@dataclass(frozen=True)
class Block:
    """A rectangle of a matrix: rows [row, row + rows), columns [column, column + columns); vectors have one column."""

    row: int
    rows: int
    column: int
    columns: int


def owned_block(shape: tuple[int, ...], split: int | None, place: tuple[int, int, int], dims: ParallelDims) -> Block:
    """What the worker at `place` holds of a parameter: first split over tp in dimension `split` (None: not), then
    rows over dp_shard, as FSDP2 shards a tp-local matrix."""
    _, shard, tp_rank = place
    rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
    row = column = 0
    if split == 0:
        rows //= dims.tp
        row = tp_rank * rows
    elif split == 1:
        columns //= dims.tp
        column = tp_rank * columns
    lo, hi = shard_rows(rows, dims.dp_shard, shard)
    return Block(row + lo, hi - lo, column, columns)


def shard_rows(rows: int, shards: int, shard: int) -> tuple[int, int]:
    """Row range [start, stop) of a shard under DTensor's Shard(0): equal chunks, the last ones short or empty."""
    chunk = -(-rows // shards)
    return min(rows, shard * chunk), min(rows, (shard + 1) * chunk)
