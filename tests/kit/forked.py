"""Commands in processes of their own that need not import torch and the package first.

What a command is to its user stays: its arguments, its environment, its standard output and error, its exit status, and
that nothing of it is left in the process of the tests. Importing takes some seconds of a processor; a process that is
forked from one that has imported everything saves them, and forks what it would spawn by torch.multiprocessing. That a
command starts by itself is shown by what tests start with `run_train` or `subprocess`.
"""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.kit.commands import CPU_ONLY, REPOSITORY, plain
from tests.kit.workers import fork_server


def run_forked(
    command: str, *arguments: object, environment: Mapping[str, str] = CPU_ONLY, stdin: str = "", timeout: int = 240
) -> subprocess.CompletedProcess:
    """`python -m command arguments` in the repository; a command with a slash is a file in it.

    Raises:
        TimeoutError: it has not ended after so many seconds; it is killed.
    """
    words = [command, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(stdin, encoding="utf-8")
        process = fork_server().Process(target=_become, args=(words, dict(environment), list(map(str, streams))))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                said = streams[2].read_text(errors="replace")[-4000:]
                raise TimeoutError(f"{' '.join(words)}: not ended after {timeout} s: {said}")
        finally:
            process.kill()
            process.join()
        out, err = (plain(path.read_bytes()) for path in streams[1:])
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _become(words: list[str], environment: dict[str, str], streams: list[str]) -> None:
    """Be that command, in a forked process."""
    import torch
    import torch.multiprocessing as mp

    for number, path in enumerate(streams):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (multiprocessing has put /dev/null there)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    mp.spawn = functools.partial(mp.start_processes, start_method="fork")
    sys.argv[:] = words
    if "/" in words[0]:
        sys.path.insert(0, str(REPOSITORY / Path(words[0]).parent))
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
