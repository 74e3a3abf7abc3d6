"""The repository's commands as a user starts them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CPU_ONLY = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_train(*arguments: str, workers: int = 2, timeout: int = 180, **environment: str) -> subprocess.CompletedProcess:
    environment = {**CPU_ONLY, "NGPU": str(workers), **environment}
    return subprocess.run(
        [str(REPOSITORY / "run_train.sh"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def error_lines(result: subprocess.CompletedProcess) -> list[str]:
    """What a command told its user, line by line, when it refused."""
    assert result.returncode == 2, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("titan_hd: error: ")]
