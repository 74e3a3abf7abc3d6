"""The launcher and its workers, forked from a process that has imported everything: a start takes a second or two.

The launcher is the real one; what differs is that it forks its workers where it would start `python -m titan_hd.train`,
and that a worker's disk can be slow: an fsync on rank R takes as many seconds longer as the file `slow-R` beside
job.dump_folder says.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.kit.commands import CPU_ONLY, REPOSITORY, plain
from tests.kit.recovery import START_SECONDS, Launch
from tests.kit.workers import fork_server


class ForkedLaunch(Launch):
    """As `Launch`; `said` is there while it runs, too."""

    def __init__(self, argv: list[str], workers: int, number: int):
        """number: tells the starts in a folder apart."""
        self.dump = Path(next(a for a in argv if a.startswith("--job.dump_folder=")).partition("=")[2])
        self._log = self.dump.with_name(f"{self.dump.name}-{number}.log")
        config = self.dump.parent / "empty.toml"
        config.touch()
        words = ["titan_hd.launch", "--nproc_per_node", str(workers), "--rdzv_backend", "c10d"]
        words += ["--rdzv_endpoint", "localhost:0", "--monitor_interval", "0.1"]
        words += ["--", "--config", str(config), *argv]
        self.process = _Process(words, self._log, self.dump.parent)

    def said(self) -> str:
        return plain(self._log.read_bytes()) if self._log.exists() else ""

    def end(self, timeout: float = START_SECONDS) -> tuple[int, str]:
        return self.process.wait(timeout), self.said()

    def worker(self, rank: int) -> int:
        """The process of a rank. It is told by its place among the launcher's children, who are started in order."""
        return sorted(self.worker_pids())[rank]


class _Process:
    """What a Launch asks of a subprocess.Popen, of a process of the fork server."""

    def __init__(self, words: list[str], log: Path, disks: Path):
        self._process = fork_server().Process(target=_launch, args=(words, str(log), str(disks)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the launcher", timeout)
        return self._process.exitcode


def _launch(words: list[str], log: str, disks: str) -> None:
    """Be the launcher."""
    import torch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    from titan_hd import launch

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(CPU_ONLY)
    os.chdir(REPOSITORY)
    torch.set_num_threads(1)
    SubprocessHandler._popen = lambda self, args, env: _Worker(args, env, Path(disks))
    sys.argv[:] = words
    launch.main()


class _Worker:
    """What torchrun's agent asks of a subprocess.Popen."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], disks: Path):
        self.args, self.returncode = args, None
        self.pid = os.fork()
        if not self.pid:
            _work(list(args[args.index("titan_hd.train") :]), env, disks)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 3600)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 3600)
            time.sleep(0.02)
        return self.returncode


def _work(argv: list[str], env: dict[str, str], disks: Path) -> None:
    """Be a worker; does not return."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        sys.argv[:] = argv
        fsync, slow = os.fsync, disks / f"slow-{env['RANK']}"

        def slow_fsync(descriptor: int) -> None:
            with contextlib.suppress(FileNotFoundError):
                time.sleep(float(slow.read_text() or 0))
            fsync(descriptor)

        os.fsync = slow_fsync
        from titan_hd import train

        train.main()
    finally:
        os._exit(1)
