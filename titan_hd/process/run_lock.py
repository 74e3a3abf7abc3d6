"""One run per folder: a lock that goes with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from titan_hd.errors import UserError

logger = logging.getLogger("titan_hd")

LOCK_FILE = "run.lock"
_PATIENCE_SECONDS = 5  # a run that was killed and started again: its old process may still be about to go


class RunLock:
    """Holds `folder` for this process.

    A POSIX record lock: the kernel drops it with the process, children do not inherit it, and NFS passes it on to other
    machines where its lock service runs. A file system without locks gives a warning and no protection.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._try():
            if time.monotonic() > deadline:
                holder = os.read(self._descriptor, 1000).decode(errors="replace").strip() or "unknown"
                os.close(self._descriptor)
                raise UserError(
                    f"job.dump_folder: another run writes to {folder} ({holder}); "
                    "wait for its end, or name another folder"
                )
            time.sleep(0.2)
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            logger.warning("job.dump_folder: cannot be locked (%s): start no second run on it", error.strerror)
        return True

    def release(self) -> None:
        os.close(self._descriptor)
