"""What tools/scaling.py computes: its bytes against counted ones, its memory and growth against ranks of huge worlds.

A world of thousands is one process here: the "fake" backend returns from every collective at once, with what it was
given. So values are meaningless, and shapes, sizes and the work of set-up are those of a true rank 0.
"""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from step_costs import Work, fsdp_gathers, gradient_collectives, refresh_bytes
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.kit import runs
from tests.kit.gathers import Gathers
from titan_hd.components.update import FoldUpdate
from titan_hd.distributed.collectives import TRAFFIC
from titan_hd.distributed.shards import base_parameters
from titan_hd.distributed.update.topology import Topology
from titan_hd.fitting import estimate_run
from titan_hd.models.registry import read_hf_config
from titan_hd.train import Trainer

# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def received(argv: list[str]) -> tuple[list[int], int, tuple[int, float], tuple[int, float]]:
    """All-gathers of the second step's forward and backward passes; bytes of its exchange, counted; planned ones
    of the updates, and with the adapters' gradients; bytes of taking slices anew, counted and computed."""
    run = runs.trainer(argv)
    run.train_step()
    gathers, before = Gathers(), TRAFFIC.received
    folds = isinstance(run.update, FoldUpdate)
    if folds:
        fold = run.update.fold

        def uncounted(*args):
            gathers.counting = False
            fold(*args)

        run.update.fold = uncounted
    with gathers:
        run.train_step()
    exchanged, before = TRAFFIC.received - before, TRAFFIC.received
    planned, anew = (0, 0), 0.0
    if folds:
        planned = sum(w.received for w in fold.plan.weights), fold.plan.received_per_step
        run.update.fold = fold
        run.update._refresh(1)
        anew = refresh_bytes(Work(run.plan.decoder, rank=1), fold.plan, compute_bytes=4)
    run.close()
    return gathers.received, exchanged, planned, (TRAFFIC.received - before, anew)


MESHES = {
    "two": (2, 2, 1, {}),
    "virtual": (2, 4, 1, {}),
    "four": (4, 4, 1, {}),
    "groups": (4, 2, 1, {}),
    "hsdp": (4, 2, 2, {}),
    "dense": (4, 4, 2, {"hdpissa__exchange": "dense"}),
    "all": (2, 4, 1, {"hdpissa__samples": "all"}),
    "all-groups": (4, 2, 1, {"hdpissa__samples": "all"}),
    "tied": (2, 2, 1, {"tied": True}),
    "full": (2, 1, 1, {"adapter__method": "full"}),
    "eight": (8, 8, 1, {}),
    "eight-groups": (8, 2, 2, {}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c[:5] == "eight" else c for c in MESHES])
def test_bytes_of_a_step_are_those_counted(case, request, tmp_path: Path):
    world, num_adapters, replicate, options = MESHES[case]
    options = dict(options)
    runs.write_model(tmp_path / "model", tie_word_embeddings=options.pop("tied", False), num_key_value_heads=2)
    runs.write_records(tmp_path / "records.jsonl")
    argv = runs.options(
        tmp_path / "model",
        tmp_path / "records.jsonl",
        tmp_path / "dump",
        hdpissa__num_adapters=num_adapters,
        parallelism__data_parallel_replicate_degree=replicate,
        training__global_batch_size=8,
        training__steps=3,
        parallelism__fsdp_reshard_after_forward="always",
        **options,
    )
    pool = request.getfixturevalue("eight_workers" if world == 8 else "workers")
    trained = case == "full"
    work = Work(read_hf_config(tmp_path / "model"), rank=1)
    samples = options.get("hdpissa__samples", "own")
    topology = Topology(num_adapters, 1, replicate, world // replicate, samples=samples)
    shared = 0 if trained else sum(collective.received for collective in gradient_collectives(work, topology))
    expected = fsdp_gathers(work.config, world // replicate, 4, trained) * (8 // world)  # fp32, per micro-batch
    ranks = pool.run(world, received, argv)
    for gathers, counted, (updates, planned), _ in ranks:
        assert sorted(gathers) == sorted(expected)
        assert counted == planned == updates + shared
    if not trained and topology.dp_shard == 2:
        counted, computed = (sum(both) for both in zip(*(anew for *_, anew in ranks)))
        # Two shards of a weight with an odd number of rows differ by one, which is counted for the larger or the mean.
        row = sum(4 * width + 4 * num_adapters * world for _, width in work.shapes().values())
        assert counted == pytest.approx(computed, abs=row)
        assert computed > 3 * row, "more than what is left open"


# ---------------------------------------------------------------------------------------------------------------------
# Large worlds


def fake_run(world: int, argv: list[str]) -> tuple[Trainer, int]:
    """Rank 0 of a world of so many after one step, and the number of Python calls of its set-up and step."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    new_group = dist.new_group
    every_group_fake = mock.patch.object(dist, "new_group", lambda *a, **k: new_group(*a, **{**k, "backend": "fake"}))
    with every_group_fake, cProfile.Profile() as profile:  # checkpoints ask for gloo, which would look for the others
        run = runs.trainer(argv)
        run.train_step()
    run.close()
    return run, sum(calls for _, calls, *_ in pstats.Stats(profile).stats.values())


def nbytes(tensors) -> int:
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def fake_state(world: int, argv: list[str]) -> tuple[dict[str, int], dict[str, int], int, int]:
    """Bytes that rank 0 holds, as counted and as computed; the size of the update's plan; Python calls."""
    run, calls = fake_run(world, argv)
    layers = [entry.layer for entry in run.update.registry.entries.values()]
    deltas = [p for layer in layers for p in (layer.delta_A, layer.delta_B)]
    state = run.update.state(changed_only=True)
    moments = [value for key, value in state.items() if key.endswith((".exp_avg", ".exp_avg_sq"))]
    fixed = [t for entry in run.update.registry.entries.values() for t in (entry.a, entry.b)]
    counted = {
        "shards": nbytes(p for _, p in base_parameters(run.model)),
        "adapters": nbytes([*deltas, *moments, *fixed, *(p.grad for p in deltas)]),
        "cache": nbytes(t for pair in run.update.fold.exchanges["factors"].cached.values() for t in pair),
    }
    held = estimate_run(run.plan, "cpu").held
    of_adapters = ("fixed factors A, B", "deltas dA, dB", "gradients", "optimizer's moments")
    computed = {
        "shards": held["weights"],
        "adapters": sum(held[name] for name in of_adapters),
        "cache": held["cache of all workers' factors"],
    }
    return counted, computed, len(repr(run.update.fold.plan)), calls


def fake_argv(folder: Path, **overrides) -> list[str]:
    runs.write_records(folder / "records.jsonl", count=8)
    config = {"model__hf_assets_path": "", "model__name": "llama3", "model__flavor": "debugmodel"}
    return runs.options(
        Path(),
        folder / "records.jsonl",
        folder / "dump",
        **config,
        hdpissa__num_adapters=8,
        adapter__rank=2,
        **overrides,
    )


@pytest.mark.parametrize(
    ("world", "replicate", "slices"),
    [
        (512, 1, "orthogonal"),
        (512, 64, "random"),
        pytest.param(4096, 512, "orthogonal", marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_rank_is_the_estimates(world, replicate, slices, workers, tmp_path: Path):
    argv = fake_argv(
        tmp_path, parallelism__data_parallel_replicate_degree=replicate, hdpissa__slices=slices, export__enable="false"
    )
    ((counted, computed, _, _),) = workers.run(1, fake_state, world, argv)
    assert counted == computed
    assert all(counted.values())


@pytest.mark.parametrize("worlds", [(64, 128, 512), pytest.param((64, 512, 4096), marks=pytest.mark.slow)])
@pytest.mark.parametrize("replicate", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_work_of_set_up_and_step_grows_at_most_linearly(replicate, worlds, workers, tmp_path: Path):
    argv = fake_argv(tmp_path, parallelism__data_parallel_replicate_degree=replicate, export__enable="false")
    results = []
    for world in worlds:
        workers.run(1, fake_state, world, argv)  # DTensor remembers how it shards each operation: count warm runs
        results += workers.run(1, fake_state, world, argv)
    (_, _, plan, low), (_, _, _, middle), (_, _, large_plan, high) = results
    small, medium, large = worlds
    print("Python calls of set-up and one step:", dict(zip(worlds, (low, middle, high))))  # shown by pytest -s
    assert large_plan <= plan + 100, "the plan knows shards, not ranks"
    assert high - middle <= 1.2 * (large - medium) / (medium - small) * (middle - low)
