"""Runs that are killed and started again: what test_recovery and the soak script share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.kit import runs
from tests.kit.commands import CPU_ONLY, Started

START_SECONDS = 600  # a machine that is busy with other things takes minutes to import torch a few times


class Launch(Started):
    """One start of the launcher with its workers, as a scheduler would start it."""

    def __init__(
        self, argv: list[str], workers: int = 2, max_restarts: int = 0, environment: dict[str, str] | None = None
    ):
        self.dump = Path(next(a for a in argv if a.startswith("--job.dump_folder=")).partition("=")[2])
        launcher = [
            sys.executable,
            "-m",
            "titan_hd.launch",
            "--nproc_per_node",
            str(workers),
            "--rdzv_backend",
            "c10d",
        ]
        launcher += ["--rdzv_endpoint", "localhost:0", "--max_restarts", str(max_restarts), "--monitor_interval", "0.1"]
        self._config = self.dump.parent / "empty.toml"
        self._config.touch()
        command = [*launcher, "--", "--config", str(self._config), *argv]
        super().__init__(command, {**CPU_ONLY, **(environment or {})})

    def worker_pids(self) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def wait_for_step(self, step: int) -> bool:
        """Until `step` has been logged; False if the run ended before."""
        return self._wait(lambda: last_step(self.dump) >= step, 0.01)

    def wait_for_save(self) -> bool:
        """Until a checkpoint is being written; False if the run ended before."""
        return self._wait(lambda: any(self.dump.glob("checkpoint/step-*.partial")), 0.001)

    def _wait(self, condition, pause: float) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(pause)
        self.kill_all()
        raise TimeoutError(self.end()[1])

    def kill_all(self) -> None:
        """Every process of the run at once, as when the machine goes down."""
        pids = [*self.worker_pids(), self.process.pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self, timeout: float = START_SECONDS) -> tuple[int, str]:
        return super().end(timeout)


def records(dump: Path) -> list[dict]:
    path = dump / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(dump: Path) -> int:
    return max((record["step"] for record in records(dump)), default=0)


def tiny_run(folder: Path, dump: str, **overrides) -> list[str]:
    """Options of a run of a few ms per step that saves often."""
    if not (folder / "model").exists():
        runs.write_model(folder / "model")
        runs.write_records(folder / "records.jsonl")
    defaults = {
        "checkpoint__enable": "true",
        "checkpoint__async_mode": "async",
        "checkpoint__interval": 3,
        "hdpissa__num_adapters": 2,
        "data__shuffle": "true",
        "adapter__dropout": 0.1,
    }
    return runs.options(folder / "model", folder / "records.jsonl", folder / dump, **(defaults | overrides))
