"""What reads data outlives the terminal: the trainer saves before it lets go of it."""

from __future__ import annotations

import subprocess
import sys

from tests.kit.commands import REPOSITORY

SCRIPT = """
import multiprocessing, os, signal

def ignored(number, pid):
    line = next(line for line in open(f"/proc/{pid}/status") if line.startswith("SigIgn"))
    return bool(int(line.split()[1], 16) & 1 << number - 1)

def report(connection):
    connection.send([ignored(signal.SIGHUP, pid) for pid in (os.getpid(), os.getppid())])

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["titan_hd.data.ignore_hangups"])
    ours, theirs = context.Pipe()
    context.Process(target=report, args=(theirs,)).start()
    assert ours.recv() == [True, True], "a process, and the server that it is forked from"
    assert not ignored(signal.SIGHUP, os.getpid())
"""


def test_the_fork_server_and_its_processes_ignore_it(tmp_path):
    """SIGHUP is sent to all of a terminal's processes."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    subprocess.run([sys.executable, path], env={"PYTHONPATH": str(REPOSITORY)}, check=True, timeout=60)
