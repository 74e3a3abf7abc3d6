"""A helper: a small Python program that this process starts and talks to through a connection.

Not `multiprocessing`: a fork copies the locks of gloo's, nccl's and CUDA's threads in whatever state they are in, and
"spawn" and "forkserver" import the trainer's main module, and with it torch, in every process. A helper is a fresh
interpreter that imports its own module alone. It ends when its connection does, also if its starter was killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection, Pipe


class HelperProcess:
    """`python -m module FD arguments`, where FD is the number of the helper's end of `connection`.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, module: str, *arguments: object, environment: dict[str, str] | None = None):
        self.connection, theirs = Pipe()
        path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self._program = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), *map(str, arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            )
        self._end = weakref.finalize(self, _end, self.connection, self._program)

    def status(self) -> int:
        """The exit status of a helper whose connection has ended; -n after signal n."""
        return self._program.wait()

    def close(self) -> None:
        """End the helper, whatever it is doing."""
        self._end()


def _end(connection: Connection, program: subprocess.Popen) -> None:
    connection.close()
    program.kill()
    program.wait()
