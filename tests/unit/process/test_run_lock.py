"""Which folders a run keeps others out of."""

from pathlib import Path

import pytest

from titan_hd.config.job_config import Checkpoint, Job, JobConfig
from titan_hd.errors import UserError
from titan_hd.process import run_lock
from titan_hd.process.run_lock import run_locks


@pytest.mark.parametrize(
    ("folder", "held"),
    [("checkpoint", 1), ("../elsewhere", 2), ("{}/absolute", 2), ("{}/run/inside", 1), ("memory://store/run", 1)],
)
def test_a_checkpoint_folder_elsewhere_is_held_too(folder: str, held: int, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", 0)
    checkpoint = Checkpoint(enable=True, folder=folder.format(tmp_path))
    locks = list(run_locks(JobConfig(job=Job(dump_folder=str(tmp_path / "run")), checkpoint=checkpoint)))
    assert len(locks) == held
    other = run_locks(JobConfig(job=Job(dump_folder=str(tmp_path / "other")), checkpoint=checkpoint))
    found = [next(other)]
    if folder in ("../elsewhere", "{}/absolute"):  # of both runs
        with pytest.raises(UserError, match=r"^checkpoint\.folder: another run writes to"):
            next(other)
    for lock in [*locks, *found]:
        lock.release()
