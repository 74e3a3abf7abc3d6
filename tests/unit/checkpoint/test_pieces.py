"""Which rank writes what: everything once, few items, and no rank that has nothing of its own."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_hd.checkpoint import pieces
from titan_hd.checkpoint.pieces import Piece, name_in_block, owned_pieces, stacked_name, stored_tensors
from titan_hd.models.registry import flavor_config, parameter_shapes

LAYER = "model.model.layers.{}.mlp.up_proj.weight"


@pytest.fixture
def world() -> Iterator[int]:
    """A fake one of 64 ranks, of which this process can be any."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    yield 64
    dist.destroy_process_group()


def mesh_of(*shape: int) -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape))


def on(mesh: DeviceMesh, placements: tuple[Placement, ...], shape: tuple[int, ...]) -> DTensor:
    """A tensor of this shape, without memory."""
    local, whole = list(shape), torch.empty(shape, device="meta")
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            local[placement.dim] = -(-local[placement.dim] // mesh.size(dim))
    part = torch.empty(local, device="meta")
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def state_of_8b(replicate: int, shard: int, holders: int) -> dict[str, DTensor]:
    """What a run of HD-PiSSA with K = 8, r = 16 saves."""
    weights = mesh_of(replicate, shard), (Replicate(), Shard(0))
    adapters = mesh_of(holders, replicate * shard // holders), (Shard(0), Replicate())
    shapes = parameter_shapes(flavor_config("llama3", "8B"))
    state = {f"model.{name}": on(*weights, tuple(shape)) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if not name.endswith("_proj.weight"):
            continue
        layer, (rows, columns) = name.removesuffix(".weight"), shape
        for side, size in (("A", (8, 16, columns)), ("B", (8, rows, 16))):
            state[f"factors.{layer}.{side}"] = on(*adapters, size)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"optimizer.{layer}.delta_{side}.{moment}"] = on(*adapters, size)
    return state | {"optimizer.step": torch.zeros(())}


def pieces_of_all(state: dict[str, torch.Tensor], ranks: int) -> dict[int, list[Piece]]:
    """By rank, of those that have any."""
    stored, found = stored_tensors(state), {}
    meshes = {id(t.device_mesh): t.device_mesh for t in state.values() if isinstance(t, DTensor)}
    for rank in range(ranks):
        for mesh in meshes.values():
            mesh._coordinate_on_dim = tuple((mesh.mesh == rank).nonzero()[0].tolist())
        if mine := owned_pieces(stored, rank):
            found[rank] = mine
    return found


def test_only_ranks_with_something_of_their_own_write(world: int):
    """8 replicas of 8 shards, 4 holders of adapters on 16 ranks each: the shards of the first replica and the first
    rank of every holder. Each element is written once, in less than 300 items a rank."""
    state = state_of_8b(8, 8, 4)
    assert len(state) == 291 + 3 * 448 + 1
    written = pieces_of_all(state, world)
    assert list(written) == [*range(8), 16, 32, 48]
    assert max(map(len, written.values())) <= 65
    total = collections.Counter()
    for piece in (piece for mine in written.values() for piece in mine):
        assert math.prod(piece.sizes) == sum(part.numel() for part in piece.parts)
        total[piece.tensor] += math.prod(piece.sizes)
    assert total == {tensor: math.prod(tensor.size) for tensor in stored_tensors(state)}


@pytest.mark.parametrize(("ranks", "holders", "most"), [(1, 1, 230), (8, 8, 65), (64, 8, 55)])
def test_items_of_a_rank(world: int, ranks: int, holders: int, most: int):
    """One rank has all of 8B, 36 GB, in pieces of at most 256 MiB but for embedding and head, and in less than 300."""
    (mine, *_) = pieces_of_all(state_of_8b(1, ranks, holders), 1).values()
    assert len(mine) <= most
    assert all(piece.nbytes <= pieces.PIECE_BYTES or len(piece.parts) == 1 for piece in mine)


def test_a_tensor_that_knows_not_all_of_the_world(world: int):
    """Norms know no tp: every tp rank has a mesh of its own with all of them, and the first one writes."""
    cube = torch.arange(64).view(16, 4)  # shards x tp
    for tp_rank, writes in ((0, True), (3, False)):
        mesh = DeviceMesh("cpu", cube[:, tp_rank], _init_backend=False, _rank=int(cube[5, tp_rank]))
        norm = on(mesh, (Shard(0),), (128,))
        assert bool(owned_pieces(stored_tensors({"model.norm.weight": norm}), int(cube[5, tp_rank]))) == writes


class TestStacks:
    def stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        return {tensor.name: tensor.size for tensor in stored_tensors(tensors)}

    def test_names(self):
        assert stacked_name(LAYER.format(31)) == ("model.model.layers.*.mlp.up_proj.weight", 31)
        assert name_in_block("model.model.layers.*.mlp.up_proj.weight", 31) == LAYER.format(31)
        assert stacked_name("model.lm_head.weight") is None

    def test_what_is_alike_in_all_blocks(self):
        alike = {LAYER.format(i): torch.zeros(2, 3) for i in range(11)}
        assert self.stored(alike) == {"model.model.layers.*.mlp.up_proj.weight": (11, 2, 3)}
        (members,) = stored_tensors(dict(reversed(alike.items()))).values()
        assert members[10] is alike[LAYER.format(10)], "in the order of the blocks, not of their names"

    @pytest.mark.parametrize(
        "other",
        [{1: torch.zeros(2, 4)}, {1: torch.zeros(2, 3, dtype=torch.bfloat16)}, {2: torch.zeros(2, 3)}, {}],
        ids=["shape", "dtype", "a block is missing", "one block"],
    )
    def test_what_is_not(self, other: dict[int, torch.Tensor]):
        tensors = {LAYER.format(i): t for i, t in ({0: torch.zeros(2, 3)} | other).items()}
        assert self.stored(tensors) == {name: tuple(t.shape) for name, t in tensors.items()}

    def test_large_ones_are_cut_between_blocks(self):
        tensors = {LAYER.format(i): torch.zeros(2, 3) for i in range(5)}
        stored = stored_tensors(tensors)
        with mock.patch.object(pieces, "PIECE_BYTES", 2 * 24):
            cut = owned_pieces(stored, rank=0)
        assert [(piece.offsets, piece.sizes) for piece in cut] == [
            ((0, 0, 0), (2, 2, 3)),
            ((2, 0, 0), (2, 2, 3)),
            ((4, 0, 0), (1, 2, 3)),
        ]
        assert owned_pieces(stored, rank=1) == []
