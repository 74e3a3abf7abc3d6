"""Runs that are stopped in the ways that happen: SIGKILL, a scheduler's signals, Ctrl-C; and a second trainer.

tests/kit/soak.py does such things thirty times and more; tests/distributed/test_checkpoint.py has what needs no
processes of its own.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.kit import runs
from tests.kit.commands import CPU_ONLY, REPOSITORY
from tests.kit.recovery import START_SECONDS, Launch, last_step, tiny_run
from tests.kit.soak import compare, soak

GRACE_SECONDS = 30  # what Slurm grants by default


def test_a_run_with_faults_at_random_moments_is_the_undisturbed_one(workers, tmp_path: Path):
    """Three of the soak's kinds; the same command goes on."""
    faults = ["a rank is killed", "a full disk", "a file of the newest checkpoint is cut off"]
    soak(tmp_path, faults, seed=1, workers=2, train=lambda argv: workers.run(2, runs.train, argv))


def test_a_killed_worker_is_started_again_by_the_launcher(workers, tmp_path: Path):
    """torchrun's --max_restarts: the run goes on by itself, and ends as if nothing had been."""
    runs_of = [tiny_run(tmp_path, name, training__steps=40) for name in ("undisturbed", "disturbed")]
    workers.run(2, runs.train, runs_of[0])
    launch = Launch(runs_of[1], max_restarts=2)
    assert launch.wait_for_step(8)
    os.kill(launch.worker_pids()[-1], signal.SIGKILL)
    status, said = launch.end()
    assert status == 0, said
    assert "resumed from" in said
    compare(tmp_path / "disturbed", tmp_path / "undisturbed", 40)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),  # in test_slurm too
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
    ids=["TERM", "USR1", "INT"],
)
def test_a_signal_saves_and_stops(tmp_path: Path, number: signal.Signals, status: int):
    """Within the grace period, at a step that has no checkpoint otherwise. The workers get it twice: from the scheduler
    and through the launcher. A second run in the folder was told so, in one line, and the first went on."""
    argv = tiny_run(tmp_path, "dump", training__steps=10**6, checkpoint__interval=10**6)
    launch = Launch(argv)
    assert launch.wait_for_step(2)
    if number == signal.SIGTERM:
        status_of_second, said = Launch(argv).end()
        assert status_of_second == 2
        (line,) = [line for line in said.splitlines() if line.startswith("titan_hd: error: ")]
        assert f"job.dump_folder: another run writes to {tmp_path / 'dump'} (process " in line
        assert launch.wait_for_step(last_step(tmp_path / "dump") + 3)
    pids, start = launch.worker_pids(), time.monotonic()
    for pid in [*pids, launch.process.pid]:
        os.kill(pid, number)
    got, said = launch.end()
    assert got == status, said
    assert time.monotonic() - start < GRACE_SECONDS
    step = last_step(tmp_path / "dump")
    assert f"stopped after step {step} of 1000000; the same command goes on" in said
    assert (tmp_path / "dump" / "checkpoint" / f"step-{step}" / "manifest.json").exists()
    assert "Traceback" not in said


def test_a_run_whose_terminal_goes_saves_and_stops(tmp_path: Path):
    """A lost ssh connection: SIGHUP, and whatever is then written on the terminal fails. As root, the machine has a
    name that nobody knows besides."""
    argv = tiny_run(tmp_path, "dump", training__steps=10**6, checkpoint__interval=10**6)
    nameless = (
        ["unshare", "--uts", "sh", "-c", 'hostname nobody-knows-me; exec "$@"', "sh"] if os.geteuid() == 0 else []
    )
    ours, theirs = os.openpty()
    run = subprocess.Popen(
        [*nameless, "setsid", "--ctty", str(REPOSITORY / "run_train.sh"), "--config", os.devnull, *argv],
        env={**CPU_ONLY, "NGPU": "1"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said, deadline = b"", time.monotonic() + START_SECONDS
    try:
        while last_step(tmp_path / "dump") < 2:
            assert run.poll() is None, said
            assert time.monotonic() < deadline, said
            if select.select([ours], [], [], 0.1)[0]:
                said += os.read(ours, 4096)
        os.close(ours)  # the terminal's end
        assert run.wait(GRACE_SECONDS) == 75
    finally:
        run.kill()
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=False)  # its worker, were it to go on
    step = last_step(tmp_path / "dump")
    assert (tmp_path / "dump" / "checkpoint" / f"step-{step}" / "manifest.json").exists()
    assert not (tmp_path / "dump" / "errors.jsonl").exists()


@pytest.mark.slow
def test_before_the_first_step_a_signal_stops_at_once(tmp_path: Path):
    launch = Launch(tiny_run(tmp_path, "dump", training__steps=10**6))
    while len(launch.worker_pids()) < 2:
        time.sleep(0.01)
    launch.process.send_signal(signal.SIGTERM)
    status, said = launch.end(timeout=GRACE_SECONDS)
    assert status == 75, said
