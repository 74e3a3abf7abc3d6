"""Whole runs with data worker processes: the same losses, nobody left behind, and a killed one is an error."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from pathlib import Path

import pytest

from tests.kit import runs
from tests.kit.commands import Started, start_train

# Another number of workers adds the same fp32 numbers in another order.
LOSS_TOLERANCE = 1e-5


@pytest.fixture
def setup(tmp_path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")

    def start(dump: str, workers: int, **overrides) -> tuple[Started, str]:
        """A run, and the mark by which its processes are known."""
        values = {"data__pack": "true", "training__seq_len": 32, "hdpissa__num_adapters": 2, "data__shuffle": "true"}
        options = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values | overrides)
        mark = uuid.uuid4().hex
        return start_train("--config", os.devnull, *options, workers=workers, TITAN_MARK=mark), mark

    return start


def marked(mark: str) -> dict[int, tuple[int, str]]:
    """pid -> (parent, command line) of the processes of a run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(folder.name)] = parent, (folder / "cmdline").read_text()
        except OSError:
            continue  # it has ended meanwhile, or is somebody else's
    return found


def data_workers(mark: str) -> list[int]:
    """What a fork server has forked."""
    servers = {
        pid: parent for pid, (parent, command) in marked(mark).items() if "multiprocessing.forkserver" in command
    }
    return [pid for pid, parent in servers.items() if parent in servers]


def assert_nobody_is_left(mark: str) -> None:
    end = time.monotonic() + 15
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def losses(dump: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (dump / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
class TestDataWorkers:
    @pytest.mark.slow
    def test_same_losses_and_nobody_is_left(self, setup, tmp_path):
        for dump, workers, num_workers in (("without", 1, 0), ("with", 2, 1)):
            run, mark = setup(dump, workers, data__num_workers=num_workers)
            status, said = run.end(timeout=240)
            assert status == 0, said
            assert "records into" in said
            assert_nobody_is_left(mark)
        assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=LOSS_TOLERANCE)

    @pytest.mark.slow
    def test_a_killed_one_ends_the_run(self, setup, tmp_path):
        run, mark = setup("killed", 1, data__num_workers=2, training__steps=1000000, export__enable="false")
        metrics, end = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
        while (
            not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end and run.process.poll() is None
        ):
            time.sleep(0.1)
        victims = data_workers(mark)
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        status, said = run.end(timeout=120)
        assert status == 1, said
        assert "a data worker process failed or was killed" in said
        assert_nobody_is_left(mark)
