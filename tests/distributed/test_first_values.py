"""What ranks send each other before the first step: the same values on every mesh, each part once, and few bytes.

Meshes on four workers (replicate x shard x tensor) and K, and what they reach: adapters that two or four workers share,
owners of an SVD in both replicas, tensor parallelism inside of a replica and among sharers.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.kit import runs
from titan_hd.distributed import factor_init, regroup
from titan_hd.distributed.collectives import TRAFFIC
from titan_hd.distributed.parallel_dims import ParallelDims

MESHES = [(2, 2, 1, 4), (2, 2, 1, 2), (2, 1, 2, 1)]
MORE = [(1, 4, 1, 4), (4, 1, 1, 1), (1, 4, 1, 2), (2, 1, 2, 2), (1, 2, 2, 1)]
SIZES = {"num_key_value_heads": 2, "intermediate_size": 38}


def argv(folder: Path, mesh: tuple[int, int, int], **overrides) -> list[str]:
    if not (folder / "model").exists():
        runs.write_model(folder / "model", **SIZES)
        runs.write_records(folder / "records.jsonl")
    return runs.options(
        folder / "model",
        folder / "records.jsonl",
        folder / "dump",
        parallelism__data_parallel_replicate_degree=mesh[0],
        parallelism__data_parallel_shard_degree=mesh[1],
        parallelism__tensor_parallel_degree=mesh[2],
        training__global_batch_size=8,
        export__enable="false",
        **overrides,
    )


def factors(argv: list[str]) -> tuple[dict[str, list], list[int], int]:
    """A run's fixed factors, whole; elements that this rank sends to each member in each exchange of slices; bytes that
    it receives in all."""
    sent, exchange = [], factor_init.exchange_lists

    def counted(send, shapes, group):
        sent.extend(t.numel() for t in send)
        return exchange(send, shapes, group)

    with mock.patch.object(factor_init, "exchange_lists", counted):
        run = runs.trainer(argv)
        before = TRAFFIC.received
        reports = [report for wave in run.update.first_values() for report in wave]
        received = TRAFFIC.received - before
    assert bool(reports) == (dist.get_rank() == 0)
    found = {
        name: [entry.a.full_tensor(), entry.b.full_tensor()] for name, entry in run.update.registry.entries.items()
    }
    run.close()
    return found, sent, received


@pytest.mark.parametrize(
    ("replicate", "shard", "tp", "k"), [*MESHES, *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in MORE)]
)
def test_slices_are_the_same_everywhere_and_come_once(replicate, shard, tp, k, workers, tmp_path: Path):
    ((want, _, _),) = workers.run(1, factors, argv(tmp_path, (1, 1, 1), hdpissa__num_adapters=k))
    ranks = workers.run(4, factors, argv(tmp_path, (replicate, shard, tp), hdpissa__num_adapters=k))
    whole = sum(a[0].numel() + b[0].numel() for a, b in want.values())  # of one adapter
    for found, sent, _ in ranks:
        assert found.keys() == want.keys()
        for name, pair in want.items():
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[name], pair)), name
        assert len(sent) % (min(k, 4 // tp) * tp) == 0, "one worker of each holder"
    total = sum(sum(sent) for _, sent, _ in ranks)
    assert total >= 2 * k * whole  # twice: when the run was set up, and asked again
    assert total <= 2 * k * whole * tp
    if tp == 1:
        assert total == 2 * k * whole, "a slice is sent to a holder once"


def sent_by_an_owner(argv: list[str], world: int) -> tuple[list[int], int]:
    """Elements that rank 0 of a world whose collectives return at once sends of the factors that it has computed, and
    those of all slices of that weight."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    new_group = dist.new_group
    with mock.patch.object(dist, "new_group", lambda *a, **k: new_group(*a, **{**k, "backend": "fake"})):
        run = runs.trainer(argv)
    sent = []
    with mock.patch.object(factor_init, "exchange_lists", lambda send, shapes, group: _note(sent, send, shapes)):
        next(iter(run.update.first_values()))
    run.close()
    names = run.update.registry.entries
    largest = max(names.values(), key=lambda entry: sum(entry.shape) * min(entry.shape))
    return sent, largest.a.numel() + largest.b.numel()


def _note(sent: list[int], send: list[torch.Tensor], shapes: list[tuple[int]]) -> list[torch.Tensor]:
    sent += [t.numel() for t in send]
    return [torch.zeros(shape) for shape in shapes]


@pytest.mark.parametrize("replicate", [1, 64])
def test_an_owner_among_512_sends_every_slice_once(replicate, workers, tmp_path: Path):
    options = argv(tmp_path, (replicate, 512 // replicate, 1), hdpissa__num_adapters=8)
    options = [option.replace("global_batch_size=8", "global_batch_size=512") for option in options]
    ((sent, all_slices),) = workers.run(1, sent_by_an_owner, options, 512)
    assert len(sent) == 8
    assert sum(sent) == all_slices


# ---------------------------------------------------------------------------------------------------------------------
# Whole tensors


def there_and_back(mesh: tuple[int, int, int], shapes: list[tuple[int, int]]) -> tuple[bool, int, int]:
    """Collect drawn tensors and hand them back doubled: whether all is right, and bytes received by either."""
    dims = ParallelDims(*mesh[:2], "cpu", mesh[2])
    place, right, received = dims.place(dims.rank), True, [0, 0]
    for wave in regroup.waves(shapes, dims):
        wholes = [torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) for shape in wave]
        blocks = [regroup.owned_block(shape, split, place, dims) for split, shape in enumerate_splits(wave)]
        parts = [regroup.cut(whole, block) for whole, block in zip(wholes, blocks)]
        held = [regroup.Sharded(shape, split, part) for (split, shape), part in zip(enumerate_splits(wave), parts)]
        before = TRAFFIC.received
        whole = regroup.collect(held, dims)
        received[0] += TRAFFIC.received - before
        if dims.rank < len(wave):
            right &= torch.equal(whole, wholes[dims.rank])
        else:
            right &= whole is None
        before = TRAFFIC.received
        back = regroup.hand_back(held, None if whole is None else 2 * whole, dims)
        received[1] += TRAFFIC.received - before
        right &= len(back) == len(parts) and all(torch.equal(b, 2 * p) for b, p in zip(back, parts))
    return right, *received


def enumerate_splits(wave: list[tuple[int, int]]) -> list[tuple[int | None, tuple[int, int]]]:
    """Every third is not split over tp."""
    return [((None, 0, 1)[sum(shape) % 3], shape) for shape in wave]


@pytest.mark.parametrize("mesh", [(1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 2, 2)])
def test_whole_tensors_go_round_within_a_replica(mesh, workers):
    """Nine tensors on four ranks: two full waves, and one that one replica alone has."""
    shapes = [(2 * n, 10 + n) for n in range(1, 10)]
    ranks = workers.run(4, there_and_back, mesh, shapes)
    assert all(right for right, *_ in ranks)
    size, replica = sum(4 * out * width for out, width in shapes), mesh[1] * mesh[2]
    collected, handed = (sum(received) for received in list(zip(*ranks))[1:])
    assert collected <= size, "whole tensors come from their parts, each once"
    # Each rank gets its parts once: those of the whole model on all replicas, and again on tp ranks what is not split.
    assert handed <= size * mesh[0] * mesh[2]
    if replica == 1:
        assert collected == 0, "a replica of one rank has all of it"
