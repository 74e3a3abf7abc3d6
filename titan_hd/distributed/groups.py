"""Process groups: who talks to whom, through which backend, and how long a collective may take.

A group of a mesh has the backend of the device that computes, and no other. What ranks agree on on the host goes over
the world (`collectives`), which has gloo as well; gloo beside nccl in every group would cost a listening socket and
three threads each, for nobody. gloo connects two ranks when they first talk to each other (`LAZY`): a rank has as many
sockets as its collectives have partners, about 2 log2(N) in a group of N in place of N - 1, and puts one address into
the rendezvous store in place of N numbers. `python tools/connections.py` counts both.

`device_id` of `init_process_group` is left out. With it torch splits every later group off the world's nccl
communicator, in which not the group's members alone have to take part: the ranks outside of a group of gloo (that of
the ranks which write a checkpoint) would wait in a split to which its members never come.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# For gloo groups that are made later: connect when a collective needs it. torch documents the variable's name.
LAZY = {"TORCH_GLOO_LAZY_INIT": "1"}


class Groups:
    """The process groups of this rank, each made once: meshes in which a rank has the same partners share it.

    device_type: of the device that computes. timeout_seconds: of the collectives; None: torch's default.
    """

    def __init__(self, device_type: str, timeout_seconds: float | None = None):
        world, self._rank = dist.group.WORLD, dist.get_rank()
        assert world is not None  # there is one
        self._device_type = device_type
        backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
        self._backend = backends[device_type]
        self._timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {tuple(range(dist.get_world_size())): world}

    def mesh(self, ranks: torch.Tensor, names: tuple[str, ...]) -> DeviceMesh:
        """A mesh whose dimensions have these groups. Collective: every rank of the world calls it with the same.

        ranks: all ranks of the world, in the shape of the mesh.
        """
        groups = [self._along(ranks, dim, name) for dim, name in enumerate(names)]
        return DeviceMesh.from_group(groups, self._device_type, ranks, mesh_dim_names=names)

    def _along(self, ranks: torch.Tensor, dim: int, name: str) -> dist.ProcessGroup:
        """The group of the ranks that differ from this one in a dimension alone."""
        lines = ranks.movedim(dim, -1).flatten(0, -2).tolist()
        mine = next(tuple(line) for line in lines if self._rank in line)
        if mine not in self._made:  # on all ranks alike: the lines of two dimensions are the same or all differ
            alone = len(mine) == 1  # a rank asks nobody then; else every rank has to name every group, in one order
            made = {tuple(line): self._new(line, name, alone) for line in ([mine] if alone else lines)}
            group = made[mine]
            assert isinstance(group, dist.ProcessGroup)  # not so for groups of other ranks
            self._made[mine] = group
        return self._made[mine]

    def _new(self, ranks: Sequence[int], name: str, alone: bool) -> object:
        return dist.new_group(
            list(ranks),
            timeout=self._timeout,
            backend=self._backend,
            use_local_synchronization=alone,
            group_desc=f"mesh_{name}",
        )
