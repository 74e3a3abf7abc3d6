"""The launcher and its workers, forked from a process that has imported everything: a start takes a second or two.

The launcher is the real one. What differs: where it would start `python -m titan_hd.train`, it lets a process go on
that was forked before the launcher had threads, whose locks a later fork would find taken for ever. And a worker's disk
can be slow: an fsync on rank R takes as many seconds longer as the file `slow-R` beside job.dump_folder says.
"""

from __future__ import annotations

import contextlib
import json
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
        self.process = _Process(words, workers, self._log, self.dump.parent)

    def said(self) -> str:
        return plain(self._log.read_bytes()) if self._log.exists() else ""

    def end(self, timeout: float = START_SECONDS) -> tuple[int, str]:
        return self.process.wait(timeout), self.said()

    def worker(self, rank: int) -> int:
        """The process of a rank. It is told by its place among the launcher's children, who are started in order."""
        return sorted(self.worker_pids())[rank]


class _Process:
    """What a Launch asks of a subprocess.Popen, of a process of the fork server."""

    def __init__(self, words: list[str], workers: int, log: Path, disks: Path):
        self._process = fork_server().Process(target=_launch, args=(words, workers, str(log), str(disks)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the launcher", timeout)
        return self._process.exitcode


def _launch(words: list[str], workers: int, log: str, disks: str) -> None:
    """Be the launcher."""
    import torch

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(CPU_ONLY)
    os.chdir(REPOSITORY)
    torch.set_num_threads(1)
    waiting: list[_Worker] = []
    for _ in range(workers):
        waiting.append(_Worker(Path(disks), waiting))

    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    from titan_hd import launch

    SubprocessHandler._popen = lambda self, args, env: waiting.pop(0).go_on(args, env)
    sys.argv[:] = words
    launch.main()


class _Worker:
    """What torchrun's agent asks of a subprocess.Popen."""

    def __init__(self, disks: Path, before: list[_Worker]):
        self.args: tuple[str, ...] = ()
        self.returncode: int | None = None
        reader, self._writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            for other in (self, *before):  # or the launcher's end would not be seen
                os.close(other._writer)
            with open(reader, encoding="utf-8") as file:
                said = file.read()
            if said:  # else the launcher has ended
                _work(*json.loads(said), disks)
            os._exit(1)
        os.close(reader)

    def go_on(self, args: tuple[str, ...], env: dict[str, str]) -> _Worker:
        self.args = args
        with open(self._writer, "w", encoding="utf-8") as file:
            json.dump([args[args.index("titan_hd.train") :], env], file)
        return self

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
