"""multinode_trainer.slurm on a real Slurm of two nodes: trains, saves on a signal, goes on after a requeue."""

import json
import re
import time

import pytest
import torch

from tests.kit import runs, slurm_cluster
from tests.kit.commands import REPOSITORY

SCRIPT = REPOSITORY / "multinode_trainer.slurm"
SECONDS = 400  # for one job; a few seconds of it are Slurm's
STEPS = 150  # so many that a signal after the first one comes before the last
SETTINGS = {"training__steps": STEPS, "checkpoint__enable": "true", "checkpoint__interval": 1000}


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


def check_whole(dump, undisturbed, steps: int) -> None:
    """Every step once, and the weights of a run that nothing has disturbed."""
    logged = map(json.loads, (dump / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in logged] == list(range(1, steps + 1))
    ours, theirs = runs.exported(dump), runs.exported(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("noticed", ["by the worker that is left", "by Slurm"])
def test_a_job_that_loses_a_node_ends_or_is_requeued_and_goes_on(slurm, inputs, workers, tmp_path, noticed: str):
    """The node's processes are gone at once. Either the other one's worker sees that, says it in a line, and the job
    fails; or Slurm takes the node for down before, and requeues by itself. The same command then resumes."""
    dump = tmp_path / "dump"
    settings = {"training__steps": 600, "checkpoint__enable": "true", "checkpoint__interval": 5}
    slurm.wait_until_idle()
    job = submit(slurm, inputs, dump, **settings)
    slurm.wait(lambda: list((dump / "checkpoint").glob("step-*5")), SECONDS, "a checkpoint")
    start = time.monotonic()
    slurm.lose_node("n2")
    if noticed == "by Slurm":
        slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")  # as after SlurmdTimeout
        slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", SECONDS, "the requeue")
    else:
        slurm.wait(lambda: slurm.job(job)["JobState"] in ("COMPLETING", "FAILED"), SECONDS, f"the end of job {job}")
    said = dump.with_suffix(".out").read_text()
    print(f"{time.monotonic() - start:.0f} s after the loss, noticed {noticed}:\n{said}")
    slurm.start_node("n2")
    if noticed == "by Slurm":
        assert "DUE TO NODE FAILURE" in said
    else:
        (line,) = [line for line in said.splitlines() if line.startswith("titan_hd: worker ")]
        assert re.match(r"titan_hd: worker \d ended with status 1: the connection to .* worker.* is lost; ", line)
        assert "Traceback" not in said
        wait_for(slurm, job, "FAILED", dump)
        slurm.wait_until_idle()
        job = submit(slurm, inputs, dump, **settings)  # the same one might still be killed on the node that is back
    undisturbed = runs.options(inputs / "model", inputs / "records.jsonl", tmp_path / "undisturbed", **settings)
    workers.run(2, runs.train, [*undisturbed, "--hdpissa.num_adapters=2"])  # meanwhile
    wait_for(slurm, job, "COMPLETED", dump)
    assert "resumed from " in dump.with_suffix(".out").read_text()
    check_whole(dump, tmp_path / "undisturbed", 600)


def test_a_signalled_job_saves_and_goes_on_after_the_requeue_with_the_same_weights(slurm, inputs, workers, tmp_path):
    """As at the time limit: SIGUSR1, a checkpoint of both nodes, status 75, the same job again, the other steps."""
    dump = tmp_path / "dump"
    job = submit(slurm, inputs, dump, **SETTINGS)
    metrics = dump / "metrics.jsonl"
    slurm.wait(lambda: metrics.exists() and metrics.read_text(), SECONDS, "the first step")
    slurm("scancel", "--signal=USR1", job)
    slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", SECONDS, "the requeue")
    (saved,) = [path.name for path in (dump / "checkpoint").iterdir()]
    assert saved != f"step-{STEPS}"
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would let it wait for two minutes
    undisturbed = runs.options(inputs / "model", inputs / "records.jsonl", tmp_path / "undisturbed", **SETTINGS)
    workers.run(2, runs.train, [*undisturbed, "--hdpissa.num_adapters=2"])  # meanwhile
    wait_for(slurm, job, "COMPLETED", dump)
    assert f"resumed from {dump / 'checkpoint' / saved}" in dump.with_suffix(".out").read_text()
    check_whole(dump, tmp_path / "undisturbed", STEPS)
    logs = dump.parent / "logs" / f"titan_hd-{job}"
    assert len(list(logs.glob("node-0/**/stderr.log"))) == len(list(logs.glob("node-1/**/stderr.log"))) == 2
    environments = map(json.loads, (dump / "environment.jsonl").read_text().splitlines())
    assert [environment["variables"]["SLURM_JOB_ID"] for environment in environments] == [job, job]
