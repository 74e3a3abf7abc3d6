"""What keeps state between the steps of the folding family, together: local steps, new slices, residuals of int8."""

import pytest
import torch

from tests.kit import runs
from titan_hd.checkpoint.reader import CheckpointReader

# fp32 sums in another order; where one moves a value over the border of two of int8's multiples, a change of dA or dB
# moves by a 127th of its row's largest.
LOSS_TOLERANCE = 1e-4

# Folds after steps 2, 4, 6 and 7, new slices before step 5; two adapters for four workers.
TOGETHER = {
    "hdpissa__num_adapters": 2,
    "hdpissa__local_steps": 2,
    "hdpissa__refresh_steps": 4,
    "hdpissa__exchange_dtype": "int8",
    "training__steps": 7,
    "training__global_batch_size": 8,
    "optimizer__weight_decay": 0.1,
    "checkpoint__enable": "true",
    "checkpoint__keep_latest_k": 0,
}
HSDP = {"parallelism__data_parallel_replicate_degree": 2}


@pytest.fixture
def setup(tmp_path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl", count=20)

    def argv(dump: str, **changes):
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **TOGETHER | changes)

    return argv


def test_resume_on_replicas_with_shared_adapters(workers, setup, tmp_path):
    """In bf16, bitwise on the same mesh, from between two folds and from a fold that ends a period. In fp32, to
    rounding, from between two folds on one worker, and from within the next period on two."""
    bf16 = {"training__mixed_precision_param": "bfloat16"}
    (whole, *_) = workers.run(4, runs.train, setup("whole", **HSDP, **bf16))
    same = setup("same", **HSDP, **bf16)
    first, second = (workers.run(4, runs.train, same, stop_after=n)[0] for n in (3, 1))
    assert first + second + workers.run(4, runs.train, same)[0] == whole
    want, got = (runs.exported(tmp_path / name) for name in ("whole", "same"))
    assert all(torch.equal(got[name], want[name]) for name in want)
    kept = {n: CheckpointReader(tmp_path / "same" / "checkpoint" / f"step-{n}") for n in (3, 4)}
    assert [reader.holds("unfolded.rates") for reader in kept.values()] == [True, False]
    residual = "residuals.model.layers.0.mlp.up_proj.delta_A"
    assert all(reader.holds(residual) for reader in kept.values()), "of local steps, or what int8 has left"

    (plain,) = workers.run(1, runs.train, setup("plain"))
    first = workers.run(4, runs.train, setup("other", **HSDP), stop_after=3)[0]
    second = workers.run(1, runs.train, setup("other"), stop_after=2)[0]
    assert first + second + workers.run(2, runs.train, setup("other"))[0] == pytest.approx(plain, rel=LOSS_TOLERANCE)
