"""The device meshes of a run, how K logical adapters map onto its data-parallel workers, and what a rank holds of W."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from titan_hd.distributed.groups import Groups
from titan_hd.distributed.row_shards import shard_rows
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

    Both are contiguous ranges: worker w computes samples w*B/W to (w+1)*B/W - 1 of every global batch of B, in
    micro-batches of `local_batch_size`; sample j belongs to adapter floor(j*K/B), whichever worker computes it.

    num_adapters: K, or 1 where all adapters learn from all samples: they are then as one (`adapter_samples`).
    """

    num_adapters: int
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


def holders_error(num_adapters: int, workers: int) -> str | None:
    """One line on why K adapters cannot be dealt to W workers, or None."""
    if max(num_adapters, workers) % min(num_adapters, workers) == 0:
        return None
    return (
        f"hdpissa.num_adapters: {num_adapters} adapters cannot be dealt to {workers} data-parallel workers; "
        "one number must divide the other"
    )


def placement_error(num_adapters: int, workers: int, global_batch: int, local_batch: int) -> str | None:
    """One line on why K adapters with their shares of a global batch cannot be dealt to W workers, or None."""
    error = holders_error(num_adapters, workers)
    if error:
        return error
    unit = local_batch * max(num_adapters, workers)
    if global_batch % unit:
        shares = f"{num_adapters} adapters" if num_adapters >= workers else f"{workers} workers"
        return (
            f"training.global_batch_size: {global_batch} must be a multiple of {unit} "
            f"(local_batch_size {local_batch} x {shares})"
        )
    return None


class Place(NamedTuple):
    """Where a global rank stands: its data-parallel worker, the shard of W that this worker owns, its tp rank."""

    worker: int
    shard: int
    tp_rank: int


@dataclass
class ParallelDims:
    """Meshes over the world, made in the order (dp_replicate, dp_shard, tp). Collective.

    timeout_seconds: of the groups' collectives; None: torch's default.

    Attributes:
        fsdp_mesh: what `fully_shard` gets: [dp_shard], or [dp_replicate, dp_shard] for HSDP.
        dp_mesh: the data-parallel workers of this tp rank, replicas and shards in one dimension.
        replica_group: the ranks of this rank's replica, neighbours, which hold all weights together.
        dp_rank, tp_rank: this rank's places in dp_mesh and in its tp group.
    """

    dp_replicate: int
    dp_shard: int
    device_type: str
    tp: int = 1
    timeout_seconds: float | None = None
    groups: Groups = field(init=False, repr=False)
    world: DeviceMesh = field(init=False)
    fsdp_mesh: DeviceMesh = field(init=False)
    dp_mesh: DeviceMesh = field(init=False)
    replica_group: dist.ProcessGroup = field(init=False, repr=False)
    dp_rank: int = field(init=False)
    tp_rank: int = field(init=False)

    def __post_init__(self) -> None:
        names, ranks = ("dp_replicate", "dp_shard", "tp"), torch.arange(self.world_size)
        self.groups = Groups(self.device_type, self.timeout_seconds)
        self.world = self.groups.mesh(ranks.view(self.dp_replicate, self.dp_shard, self.tp), names)
        self.fsdp_mesh = self.world[names[:2]] if self.dp_replicate > 1 else self.world["dp_shard"]
        self.dp_mesh = self.groups.mesh(ranks.view(self.dp_size, self.tp), ("dp", "tp"))["dp"]
        by_replica = self.groups.mesh(ranks.view(self.dp_replicate, -1), ("dp_replicate", "replica"))
        self.replica_group = by_replica.get_group("replica")
        # Looked up once: every access by name builds a mesh of its own.
        self.dp_rank, self.tp_rank = self.dp_mesh.get_local_rank(), self.world["tp"].get_local_rank()

    @property
    def dp_size(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp

    @property
    def replica_size(self) -> int:
        """Ranks of a replica."""
        return self.dp_shard * self.tp

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.dp_rank * self.tp + self.tp_rank

    def place(self, rank: int) -> Place:
        worker, tp_rank = divmod(rank, self.tp)
        return Place(worker, worker % self.dp_shard, tp_rank)

    def first_copy(self, rank: int, split: int | None) -> bool:
        """Whether a global rank is the first of those that hold the same part of a parameter, and so the one that sends
        or writes it: replicas hold the same, and tp ranks too where the parameter is not split over tp (`split` None).
        """
        return rank < self.replica_size and self.first_in_replica(rank, split)

    def first_in_replica(self, rank: int, split: int | None) -> bool:
        """The same of the ranks of each replica."""
        return split is not None or self.place(rank).tp_rank == 0

    def adapter_mesh(self, num_adapters: int) -> DeviceMesh:
        """[adapter, adapter_group, tp]: min(K, W) holders of adapters x workers that share one x tensor parallelism."""
        holders = min(num_adapters, self.dp_size)
        ranks = torch.arange(self.world_size).view(holders, -1, self.tp)
        return self.groups.mesh(ranks, ("adapter", "adapter_group", "tp"))

    def one_of_each_holder(self, num_adapters: int) -> dist.ProcessGroup:
        """The group of this rank in which every holder of adapters is once, with its tp ranks: those at the same place
        in their "adapter_group". In the order of the ranks. Collective."""
        ranks = torch.arange(self.world_size).view(min(num_adapters, self.dp_size), -1, self.tp)
        lines = ranks.transpose(0, 1).flatten(1)
        return self.groups.mesh(lines, ("adapter_group", "holders")).get_group("holders")


@dataclass(frozen=True)
class Block:
    """A rectangle of a matrix: rows [row, row + rows), columns [column, column + columns); vectors have one column,
    and what has more dimensions than two is a matrix of its first one's rows."""

    row: int
    rows: int
    column: int
    columns: int


def local_part(tensor: torch.Tensor | None) -> torch.Tensor:
    """What this rank holds of a parameter that is sharded, or of its gradient; shares its memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def owned_block(shape: tuple[int, ...], split: int | None, place: Place, dims: ParallelDims) -> Block:
    """What the rank at `place` holds of a parameter: first split over tp in dimension `split` (None: not), then rows
    over dp_shard, as FSDP2 shards a tp-local matrix."""
    rows, columns = shape[0], math.prod(shape[1:])
    row = column = 0
    if split == 0:
        rows //= dims.tp
        row = place.tp_rank * rows
    elif split == 1:
        columns //= dims.tp
        column = place.tp_rank * columns
    lo, hi = shard_rows(rows, dims.dp_shard, place.shard)
    return Block(row + lo, hi - lo, column, columns)
