"""What a route is: one way in which the update of a weight travels from the adapters' holders to the shards of W.

It has two halves. A `Route` counts what a weight costs, from shapes alone and without torch: the plan chooses by it.
Its `Exchange`, made once per run, holds the process groups and moves the tensors. `factors.py` and `dense.py` are the
first halves of our two routes, `routes.py` is the table. To add one, write a file like these, name it in the table, and
add its name to the values of hdpissa.exchange in `config/job_config.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from titan_hd.distributed.update.runtime import Task
from titan_hd.distributed.update.topology import Topology

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from titan_hd.distributed.parallel_dims import ParallelDims
    from titan_hd.distributed.update.apply import Rounding

Shape = tuple[int, int]  # (out, in) of W; of the tp-local matrix under tensor parallelism


class Collective(NamedTuple):
    """received: bytes that the worker with the largest shard gets from the others. The `size` members of the group are
    every `apart`-th data-parallel worker."""

    kind: Literal["all_gather", "all_to_all", "reduce_scatter", "all_reduce"]
    received: int
    size: int
    apart: int


class Memory(NamedTuple):
    """Bytes of one bucket: `held` from its first collective to its last product, `computing` more while it computes.

    One bucket at a time computes, so a fold needs at most `held` of `in_flight` buckets and `computing` of one.
    """

    held: int
    computing: int


class Route:
    """Costs of one way to travel. Arguments: `shapes` of the weights of a bucket; `t`, the sizes of the run; `cached`:
    the weights' fixed factors stay on the workers.

    name: as in hdpissa.exchange and in the plan's table.
    fills_bucket: each weight travels by itself; otherwise those of a transformer block share their collectives.
    """

    name: str
    fills_bucket: bool

    def traffic(self, shapes: Sequence[Shape], t: Topology, cached: bool) -> list[Collective]:
        """The collectives of one step."""
        raise NotImplementedError

    def flops(self, shape: Shape, t: Topology) -> int:
        """Operations of one step's products for a weight, on the worker with the largest shard."""
        raise NotImplementedError

    def cache_bytes(self, shape: Shape, t: Topology) -> int:
        """Memory per worker that would spare a weight's fixed factors their way in every step; 0: none travel."""
        return 0

    def memory(self, shapes: Sequence[Shape], t: Topology, cached: bool, device_type: str = "cuda") -> Memory:
        """The most that a bucket needs, beside what is cached."""
        raise NotImplementedError

    def exchange(self, mesh: DeviceMesh, dims: ParallelDims, coefficient: float, wire: torch.dtype) -> Exchange:
        """The half that moves tensors.

        mesh: the registry's [adapter, adapter_group, tp]; coefficient: c of the update; wire: dtype of dA and dB on the
        way.
        """
        raise NotImplementedError


class HostedFactors(NamedTuple):
    """The adapters of one weight on this worker: a, da [k, r, in], b, db [k, out, r]; views, fp32.

    scales: None; or, where int8 travels and da and db are int8, what their values are multiples of, fp32 [2, k, r]: of
    each row of da, then of each column of db.
    """

    a: torch.Tensor
    b: torch.Tensor
    da: torch.Tensor
    db: torch.Tensor
    scales: torch.Tensor | None = None

    def deltas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """da and db as what they stand for, fp32."""
        if self.scales is None:
            return self.da, self.db
        return self.da * self.scales[0, :, :, None], self.db * self.scales[1, :, None, :]


class Update(Protocol):
    """What arrived for one weight."""

    def add_to(self, w: torch.Tensor, decay: float, rounding: Rounding | None) -> None:
        """w <- (1 - decay) w + the update, in place, for this worker's rows w [rows, in]; no collectives.

        rounding: given where w is bf16.
        """


class Exchange:
    """A route at work. Both generators issue collectives, yield while they travel, and are the same on all ranks."""

    def prepare(self, names: Sequence[str], local: Sequence[HostedFactors]) -> Task:
        """Send the fixed factors of a bucket, at the start and when they have changed, and keep what arrives."""
        raise NotImplementedError

    def travel(self, names: Sequence[str], local: Sequence[HostedFactors]) -> Generator[None, None, Sequence[Update]]:
        """Exchange a bucket's updates; returns one for each weight, which may refer to what is in `local`."""
        raise NotImplementedError
