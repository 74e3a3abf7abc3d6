"""multinode_trainer.slurm on a real Slurm of two nodes: trains, saves on a signal, goes on after a requeue."""

import json

import pytest

from tests import runs, slurm_cluster
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "multinode_trainer.slurm"
SECONDS = 240  # for one job; a few seconds of it are Slurm's


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    cluster = slurm_cluster.SlurmCluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    runs.write_model(folder / "model")
    runs.write_records(folder / "records.jsonl")
    (folder / "run.toml").write_text("")
    return folder


def submit(slurm, inputs, dump, **overrides) -> str:
    """The number of a job of two nodes with one worker each, submitted in the repository as a user does."""
    options = runs.options(inputs / "model", inputs / "records.jsonl", dump, hdpissa__num_adapters=2, **overrides)
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={dump}.out", f"--chdir={dump.parent}", str(SCRIPT)]
    command += ["--config", str(inputs / "run.toml")]
    environment = {"NGPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TITAN_HD_ROOT": str(REPOSITORY)}
    return slurm(*command, *options, **environment)


def wait_for(slurm, job: str, state: str, dump) -> dict[str, str]:
    def ended() -> bool:
        return slurm.job(job)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

    slurm.wait(ended, SECONDS, f"job {job}")
    found = slurm.job(job)
    assert found["JobState"] == state, dump.with_suffix(".out").read_text()
    return found


def test_a_job_of_two_nodes_trains_and_exports(slurm, inputs, tmp_path):
    job = submit(slurm, inputs, tmp_path / "dump")
    wait_for(slurm, job, "COMPLETED", tmp_path / "dump")
    records = [json.loads(line) for line in (tmp_path / "dump" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert runs.exported(tmp_path / "dump")
    logs = tmp_path / "logs" / f"titan_hd-{job}"
    assert len(list(logs.glob("node-0/**/stderr.log"))) == len(list(logs.glob("node-1/**/stderr.log"))) == 1
