"""The repository's commands as a user starts them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

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


def call_tool(main: Callable[[], None], *arguments: object) -> subprocess.CompletedProcess:
    """A tool's `main` with arguments, inside this process: a process of its own would import torch first."""
    words, status = list(map(str, arguments)), 0
    with (
        mock.patch.object(sys, "argv", ["tool", *words]),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            main()
        except SystemExit as left:
            status = left.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def error_lines(result: subprocess.CompletedProcess) -> list[str]:
    """What a command told its user, line by line, when it refused."""
    assert result.returncode == 2, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("titan_hd: error: ")]
