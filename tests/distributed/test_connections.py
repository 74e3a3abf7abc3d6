"""What a run connects: sockets and groups on paper, against those that processes have; time-outs of all groups."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.kit import runs
from titan_hd.distributed.collectives import gather_on_rank_zero
from tools import connections
from tools.connections import Call, as_made, eager, mesh_groups, partners, sockets


def argv(folder: Path, world: int, **overrides) -> list[str]:
    """Of a run on two replicas, with an adapter for two workers, whose slices come from SVDs."""
    runs.write_model(folder / "model")
    runs.write_records(folder / "records.jsonl")
    return runs.options(
        folder / "model",
        folder / "records.jsonl",
        folder / "dump",
        hdpissa__num_adapters=world // 2,
        parallelism__data_parallel_replicate_degree=2,
        training__global_batch_size=8,
        checkpoint__enable="true",
        export__enable="false",
        **overrides,
    )


def count(argv: list[str]) -> connections.Counts:
    before = connections.connected()  # the pool may have more
    # By the store, so that nobody connects to a rank before that rank has counted.
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    store.set(f"counted {rank}", "")
    store.wait([f"counted {other}" for other in range(size)])
    return connections.count(argv, before)


@pytest.mark.parametrize("world", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_sockets_are_those_computed(world: int, request, tmp_path: Path):
    """The host's collectives over the world need no partner that a barrier has not connected already."""
    pool = request.getfixturevalue("eight_workers" if world == 8 else "workers")
    for rank, found in enumerate(pool.run(world, count, argv(tmp_path, world))):
        assert found.counted == found.computed > 0
        on_host = found.calls["default_pg"] - {Call("alltoall_base_")}  # of weights and factors: on the device
        # Objects travel over the world from rank 0 to all, and to rank 0 from step to step; to all from all in errors.
        assert {call.name for call in on_host} <= {"barrier", "allreduce_", "broadcast_", "send", "recv_"}
        assert on_host >= connections.WORLD_CALLS
        assert sockets(on_host, rank, world) == len(partners(Call("barrier"), rank, world))
        assert found.calls["checkpoints"] <= connections.CHECKPOINT_CALLS
        writing = connections.writers(2, world // 2, 1, world // 2)
        assert len(writing) < world
        assert ("checkpoint_writers" in found.calls) == (rank in writing)
        calls = found.calls.get("checkpoint_writers", set())
        assert {call.name for call in calls} <= {"allreduce_", "broadcast_", "send", "recv_"}


def test_a_rank_of_512_has_few_sockets():
    """As 64 replicas of 8 shards, with 8 adapters. By torch's defaults there would be more than a system allows."""
    made, default = as_made(64, 8, 1, 8), eager(64, 8, 1, 8)
    assert (default.asked, default.most) == (1169, 1170)
    assert made.asked == 147
    assert max(made.first, made.most) < 64
    all_write = as_made(1, 512, 1, 8)
    assert max(all_write.first, all_write.most) < 64
    assert made.read < default.read / 1000


def test_meshes_have_the_backend_of_the_device():
    """Each rank's groups hold it, and its partners' groups are the same; of one rank there is one group."""
    for rank in (0, 5):
        asked = mesh_groups(2, 2, 2, 2, rank)
        assert {made.backend for made in asked} == {"nccl"}
        mine = [made.ranks for made in asked if rank in made.ranks]
        assert len(set(mine)) == len(mine)
        # dp_replicate, dp_shard, tp, dp, a replica, one of each holder; adapter, adapter_group are as the first
        assert (
            mine
            == {
                0: [(0, 4), (0, 2), (0, 1), (0, 2, 4, 6), (0, 1, 2, 3), (0, 1, 4, 5)],
                5: [(1, 5), (5, 7), (4, 5), (1, 3, 5, 7), (4, 5, 6, 7), (0, 1, 4, 5)],
            }[rank]
        )


@pytest.mark.parametrize("size", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("name", ["barrier", "allreduce_", "alltoall_base_", "broadcast_", "gather_"])
def test_partners_agree(name: str, size: int):
    """Whom a rank talks to, talks to it; and all are reached."""
    for root in range(size) if name in ("broadcast_", "gather_") else [0]:
        of = [partners(Call(name, root), rank, size) for rank in range(size)]
        assert all(rank in of[other] and other != rank for rank in range(size) for other in of[rank])
        reached = {0}
        while more := set().union(*(of[rank] for rank in reached)) - reached:
            reached |= more
        assert reached == set(range(size))


# ---------------------------------------------------------------------------------------------------------------------
# Time-outs


def timeouts(argv: list[str]) -> dict[str, list[float | None]]:
    """Of the groups that a run has made, by their descriptions: at its start, after its first step, in its export."""

    def now() -> dict[str, float]:
        groups = dist.distributed_c10d._world.pg_map
        backends = {group.group_desc: group._get_backend(torch.device("cpu")) for group in groups}
        return {name: backend.options._timeout / datetime.timedelta(seconds=1) for name, backend in backends.items()}

    run = runs.trainer(argv)
    found = [now()]
    run.add_hook(1, lambda _: found.append(now()) if run.step == 2 else None)
    run.train()
    found.append(now())
    run.close()
    return {name: [values.get(name) for values in found] for name in found[-1]}


def test_every_group_has_the_time_outs_of_the_config(workers, tmp_path: Path):
    options = argv(tmp_path, 4, training__steps=2)
    options += ["--comm.init_timeout_seconds=71", "--comm.train_timeout_seconds=72", "--comm.save_timeout_seconds=73"]
    options += ["--comm.export_timeout_seconds=74", "--export.enable=true"]
    for rank, found in enumerate(workers.run(4, timeouts, options)):
        assert found.pop("checkpoints") == [73, 73, 73]
        if rank in connections.writers(2, 2, 1, 2):
            assert found.pop("checkpoint_writers") == [None, 73, 73]  # it is made by the first save
        assert found.pop("default_pg")[1:] == [72, 74]  # the pool has made it
        assert len(found) >= 2
        assert all(values == [71, 72, 74] for values in found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Small results


def gathered(told: list[str | None], part: list[int]) -> list[list[str]]:
    """Over all ranks, and over those of `part`."""
    group = dist.new_group(part)
    rank = dist.get_rank()
    everybodys = gather_on_rank_zero(told[rank])
    return [everybodys, gather_on_rank_zero(told[rank], group) if rank in part else []]


@pytest.mark.parametrize("told", [["a", None, "c", "d"], ["a", "b", "c" * 3000], [None, None], ["a"]])
def test_the_first_rank_gets_what_the_others_tell(told: list, workers):
    size = len(told)
    part = list(range(size // 2, size))
    found = workers.run(size, gathered, told, part)
    assert found[0][0] == [text for text in told if text is not None]
    assert found[part[0]][1] == [told[rank] for rank in part if told[rank] is not None]
    assert not any(everybodys for everybodys, _ in found[1:])
