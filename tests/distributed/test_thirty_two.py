"""A run on 32 processes of this machine, as on four nodes of eight: it starts, steps, saves, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kit import runs
from tests.kit.workers import WorkerPool

WORLD, ADAPTERS, STEPS = 32, 16, 4


@pytest.fixture
def thirty_two_workers():
    pool = WorkerPool(WORLD)
    yield pool
    pool.close()


@pytest.mark.slow
def test_a_resumed_run_on_32_processes_is_the_one_without_interruption(thirty_two_workers, tmp_path: Path):
    """4 replicas of 8 shards, 16 adapters on two workers each. The checkpoint is written by those that hold something
    which no rank before them has: the first replica, and the first holder of every adapter."""
    runs.write_model(tmp_path / "model", num_key_value_heads=4)
    runs.write_records(tmp_path / "records.jsonl")

    def argv(dump: str) -> list[str]:
        return runs.options(
            tmp_path / "model",
            tmp_path / "records.jsonl",
            tmp_path / dump,
            hdpissa__num_adapters=ADAPTERS,
            parallelism__data_parallel_replicate_degree=4,
            training__global_batch_size=WORLD,
            training__steps=STEPS,
            data__shuffle="true",
            adapter__dropout=0.1,
            checkpoint__enable="true",
            checkpoint__async_mode="async",
            checkpoint__interval=1000,
        )

    run = thirty_two_workers.run
    whole = run(WORLD, runs.train, argv("whole"))
    begun = run(WORLD, runs.train, argv("resumed"), STEPS // 2)
    rest = run(WORLD, runs.train, argv("resumed"))
    for rank in range(WORLD):
        assert begun[rank] + rest[rank] == whole[rank] == whole[0], rank
    assert len(set(whole[0])) == STEPS
    ours, theirs = runs.exported(tmp_path / "resumed"), runs.exported(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved = tmp_path / "resumed" / "checkpoint" / f"step-{STEPS // 2}"
    written = {path.name for path in saved.glob("*.distcp")}
    assert written == {f"__{rank}_0.distcp" for rank in [*range(8), *range(8, WORLD, 2)]}
