"""How runs are made and how they end, with a shell script in place of run_train.sh."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from compare import running
from compare.running import PlannedRun, Runner, Stopped, check_started, environment

from titan_hd.config.job_config import JobConfig, Training
from titan_hd.errors import UserError


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script's text is a run's command; its options are the script's arguments."""

    def write(text: str) -> None:
        path = tmp_path / "run_train.sh"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(running, "RUN_TRAIN", path)

    return write


def planned(tmp_path: Path, name: str = "lora", *options: str) -> PlannedRun:
    return PlannedRun(name, tmp_path / name, [*options], JobConfig(), None)  # pyrefly: ignore[bad-argument-type]


def made(runner: Runner, *runs: PlannedRun) -> dict[str, str]:
    ended = {}
    runner.make(runs, lambda run, status: ended.update({run.name: status}))
    return ended


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("exit 0", "complete"),
        ("exit 3", "diverged"),
        ("echo 'torch.OutOfMemoryError: CUDA out of memory' >&2; exit 1", "out_of_memory"),
        ('echo "DefaultCPUAllocator: can\'t allocate memory"; exit 1', "out_of_memory"),
        ("exit 137", "out_of_memory"),
        ("echo out of memory; exit 0", "complete"),
        ("exit 1", "failed"),
    ],
)
def test_how_a_run_ended(tmp_path, script, command: str, status: str):
    script(command)
    assert made(Runner(1, 1), planned(tmp_path)) == {"lora": status}


def test_a_fault_of_the_user_ends_the_comparison(tmp_path, script):
    script("echo 'titan_hd: error: data.train: no such file' >&2; exit 2")
    with pytest.raises(UserError, match=r"^lora: data\.train: no such file \(.*run\.log\)$"):
        made(Runner(1, 1), planned(tmp_path), planned(tmp_path, "full"))


def test_after_a_fault_of_the_user_nothing_starts(tmp_path, script):
    """Not even the run that waits for the place of the one at fault, nor is one that runs beside it left alone."""
    script(
        f"""[ $1 != beside ] || trap 'touch {tmp_path}/saved; exit 75' TERM
        touch {tmp_path}/on_$1
        case $1 in
        fault) while [ ! -e {tmp_path}/on_beside ]; do sleep 0.01; done; echo 'titan_hd: error: mend this'; exit 2 ;;
        beside) while :; do sleep 0.01; done ;;
        esac"""
    )
    for _ in range(10):
        for of_before in ("on_fault", "on_beside", "saved"):
            (tmp_path / of_before).unlink(missing_ok=True)
        with pytest.raises(UserError, match="mend this"):
            made(Runner(1, 2), *(planned(tmp_path / "runs", name, name) for name in ("fault", "beside", "next")))
        assert (tmp_path / "saved").exists()
        assert not (tmp_path / "on_next").exists()


@pytest.mark.parametrize("status", [75, 130])
def test_a_run_that_a_signal_ended_is_no_failure(tmp_path, script, status: int):
    script(f"exit {status}")
    with pytest.raises(Stopped):
        made(Runner(1, 1), planned(tmp_path))


def test_sigterm_reaches_the_runs_and_starts_no_more(tmp_path, script):
    script(f"trap 'echo saved > {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/on_$1; while :; do sleep 0.05; done")
    runs = [planned(tmp_path, name, name) for name in ("a", "b", "c")]

    def send() -> None:
        while not (tmp_path / "on_a").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        made(Runner(1, 1), *runs)
    sender.join()
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "on_c").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_side_by_side_have_devices_of_their_own(monkeypatch):
    monkeypatch.setattr(running.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    found = [environment(2, 2, place) for place in range(2)]
    assert found == [{"NGPU": "2", "CUDA_VISIBLE_DEVICES": "2,3"}, {"NGPU": "2", "CUDA_VISIBLE_DEVICES": "5,7"}]


def test_runs_side_by_side_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert environment(2, 2, 1) == {"NGPU": "2", "OMP_NUM_THREADS": "4"}
    assert environment(4, 8, 1)["OMP_NUM_THREADS"] == "1"


def test_a_folder_of_other_settings_is_refused(tmp_path):
    run = planned(tmp_path)
    options = {"workers": 2, "threshold": 1e-3}
    check_started(run, options)
    started = run.folder / "comparison.toml"
    text = started.read_text()
    assert "patience" in text
    started.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("patience")))
    check_started(run, options)  # an earlier version did not have that key
    other = PlannedRun(run.name, run.folder, [], JobConfig(training=Training(seed=7)), run.plan)
    with pytest.raises(UserError, match="holds a run with other settings; name another folder, or remove it"):
        check_started(other, options)
    with pytest.raises(
        UserError, match=r"--workers: .*lora holds a run with 2, not 4; give that, or name another folder"
    ):
        check_started(run, {**options, "workers": 4})
    with pytest.raises(UserError, match="--threshold: "):
        check_started(run, {**options, "threshold": 0.1})
    (run.folder / "options.json").unlink()
    check_started(run, {"workers": 4})  # nor did it note them
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="a file/lora: cannot be written: Not a directory"):
        check_started(planned(tmp_path / "a file"), options)
