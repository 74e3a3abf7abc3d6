"""The repository's commands as a user starts them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parent.parent.parent
os.environ.pop("FORCE_COLOR", None)  # CI may set it; what commands write is compared
CPU_ONLY = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def plain(said: bytes) -> str:
    """What a command wrote where no terminal is: no carriage returns, no escape codes."""
    text = said.decode(errors="replace")
    assert "\r" not in text, text
    assert "\x1b" not in text, text
    return text


def run_train(*arguments: str, workers: int = 2, timeout: int = 180, **environment: str) -> subprocess.CompletedProcess:
    environment = {**CPU_ONLY, "NGPU": str(workers), **environment}
    command = [str(REPOSITORY / "run_train.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=timeout, check=False)
    return subprocess.CompletedProcess(command, done.returncode, plain(done.stdout), plain(done.stderr))


class Started:
    """A command that runs while a test goes on. Its standard error goes to a file: nobody reads meanwhile, and a full
    pipe would stop it after some hundred steps."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stderr=self._stderr)

    def end(self, timeout: float) -> tuple[int, str]:
        """Exit status and what was said on the standard error."""
        status = self.process.wait(timeout=timeout)
        self._stderr.seek(0)
        return status, plain(self._stderr.read())


def start_train(*arguments: str, workers: int = 2, **environment: str) -> Started:
    command = [str(REPOSITORY / "run_train.sh"), *arguments]
    return Started(command, {**CPU_ONLY, "NGPU": str(workers), **environment})


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
